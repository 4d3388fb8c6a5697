# SPDX-License-Identifier: Apache-2.0
"""Where does an entry of a checkpoint's weight live on this rank? Ask the model's own loader.

`trace` runs the model's ``load_weights`` for one parameter on a ``meta`` tensor, which has a shape
and strides but no memory, under a dispatch mode that records every ``copy_`` of a view of it into
the model, and lets none of them happen. Fused, sharded, tied and expert weights need no table: the
loader itself says where it would put them. It costs no memory and no time of the weight's size.

A loader that does not place the weight verbatim (quantizes, casts, derives another tensor, changes
the model in another way) is refused by name, with the model as it was. Sits above ``boxes``; knows
``nn.Module`` and nothing of any engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from shira.errors import PlacementError
from shira.serve.boxes import Box, boxes_between, locate

_aten = torch.ops.aten
_CONSTANT = {_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default}
_SAME_VALUES = {_aten._to_copy.default, _aten.clone.default}


class Loads(Protocol):
    """A model with the loader of its checkpoint, as every model of vLLM is."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Put each named weight of a checkpoint where the model keeps it."""

    def modules(self) -> Iterable[nn.Module]:
        """As `nn.Module.modules`."""


class Placement(NamedTuple):
    """A part of a checkpoint's weight and where this rank keeps it.

    Attributes:
        storage: 1-D view of the whole storage that the part lies in.
        box: Which entries, and at which positions of the storage.
    """

    storage: Tensor
    box: Box

    @property
    def key(self) -> int:
        """One number for each storage."""
        return storage_key(self.storage)

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the flat indices lie here, and their positions; see `shira.serve.boxes`."""
        return locate(self.box, indices)


def trace(
    model: Loads, name: str, shape: Sequence[int], dtype: torch.dtype
) -> tuple[Placement, ...]:
    """Where a model keeps the weight that its checkpoint calls ``name``.

    Args:
        model: Has ``load_weights``; none of its weights is written.
        name: The checkpoint's name of the weight.
        shape: The whole weight's shape in the checkpoint.
        dtype: The dtype in which the model keeps it.

    Returns:
        A placement for each part; none if this rank keeps no part of it (another stage of a
        pipeline does, or the loader skips the name).

    Raises:
        PlacementError: If the loader does not know the name, refuses the shape, or does not place
            the weight verbatim.
    """
    probe = torch.empty(tuple(shape), dtype=dtype, device="meta")
    before = held_by(model)
    recorder = _Recorder(name, probe, {storage_key(held.data) for held in before})
    try:
        with torch.no_grad(), recorder:
            model.load_weights([(name, probe)])
    except PlacementError:
        raise
    except Exception as error:  # whatever a loader raises, it does not take this weight
        raise PlacementError(
            f"the model's loader does not take {name!r} of shape {tuple(shape)} as {dtype}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        replaced = _put_back(before)
    if replaced:
        raise PlacementError(f"the loader of {name!r} replaces parameter {replaced!r}")
    found: dict[tuple[int, Box], Placement] = {}
    for target, source in recorder.copies:
        try:
            boxes = boxes_between(source, target)
        except ValueError as error:
            raise PlacementError(f"the loader of {name!r} does not place it: {error}") from error
        for box in boxes:  # a loader may copy the same part twice
            found.setdefault((storage_key(target), box), Placement(whole_storage(target), box))
    return tuple(found.values())


def whole_storage(tensor: Tensor) -> Tensor:
    """All of a tensor's storage as a 1-D view of its dtype, whatever part the tensor shows."""
    entries = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((entries,), (1,), 0)


class _Recorder(TorchDispatchMode):
    """Records copies of views of the probe into the model; no write to the model happens."""

    def __init__(self, name: str, probe: Tensor, model: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = name
        self.probe = storage_key(probe)
        self.model = model
        self.derived = ""
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.copy_.default and storage_key(args[0]) in self.model:
            return self._copy(args[0], args[1])
        if func in _SAME_VALUES and self._is_probe(args[0]):
            wanted = kwargs.get("dtype") or args[0].dtype
            if wanted != args[0].dtype:
                raise self._refuse(f"it casts the weight from {args[0].dtype} to {wanted}")
            return args[0].detach()
        for tensor in _written(func, args, kwargs):
            if storage_key(tensor) in self.model:
                if func in _CONSTANT:  # such as the padding behind a vocabulary
                    return tensor
                raise self._refuse(f"it changes the model by {func}")
            if self._is_probe(tensor):
                raise self._refuse(f"it changes the weight by {func}")
        out = func(*args, **kwargs)
        if self._any_probe(args) and not self._any_probe((out,)):
            self.derived = str(func)
        return out

    def _copy(self, target: Tensor, source: Tensor) -> Tensor:
        if not self._is_probe(source):
            how = f" (derived by {self.derived})" if self.derived else ""
            raise self._refuse(f"it copies another tensor than the weight{how}")
        if source.dtype != target.dtype:
            raise self._refuse(f"it casts the weight from {source.dtype} to {target.dtype}")
        self.copies.append((target, source.expand(target.shape)))
        return target

    def _any_probe(self, values: Iterable[object]) -> bool:
        """Whether one of the values, or of those in a list among them, is a view of the weight."""
        flat = (
            v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])
        )
        return any(map(self._is_probe, flat))

    def _is_probe(self, value: object) -> bool:
        return isinstance(value, Tensor) and storage_key(value) == self.probe

    def _refuse(self, why: str) -> PlacementError:
        return PlacementError(
            f"the model does not keep {self.name!r} as its checkpoint has it, so single entries "
            f"cannot be exchanged (a quantized, cast or derived weight?): in loading, {why}"
        )


def storage_key(tensor: Tensor) -> int:
    """One number for each storage; a wrapper around other tensors has its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """The tensor arguments that an operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor):
                    yield tensor


class InPlace(NamedTuple):
    """A parameter or buffer as it was: the dict that holds it, its name there, its memory."""

    where: dict[str, Any]
    name: str
    tensor: Tensor
    data: Tensor


def held_by(model: Loads) -> list[InPlace]:
    """Every parameter and buffer of a model that has memory, tied ones as often as they occur."""
    return [
        InPlace(where, name, tensor, tensor.data)
        for module in model.modules()
        for where in (module._parameters, module._buffers)
        for name, tensor in where.items()
        if tensor is not None and not is_lazy(tensor)
    ]


def _put_back(before: list[InPlace]) -> str:
    """Undo the replacement of whole parameters; the name of one, if any was replaced."""
    replaced = ""
    for where, name, tensor, data in before:
        if where.get(name) is not tensor or storage_key(tensor) != storage_key(data):
            where[name] = tensor
            tensor.data = data
            replaced = name
    return replaced
