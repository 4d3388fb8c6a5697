# SPDX-License-Identifier: Apache-2.0
"""Find where this process keeps an entry of a checkpoint's weight, by asking the model's loader.

`trace` runs the model's ``load_weights`` for one parameter on a ``meta`` tensor, which has a shape
and strides but no memory, under a dispatch mode that records every ``copy_`` of a view of it into
the model, and lets none of them happen. Fused, sharded, tied and expert weights need no table: the
loader itself says where it would put them. It costs no memory and no time of the weight's size.

A recorded copy is of a *view* of the checkpoint's weight to a view of what the process keeps: a
`Box`.

A loader that does not place the weight verbatim (quantizes, casts, derives another tensor, changes
the model in another way) is refused. Locating k entries costs O(k).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shira.checkpoints.boxes import Box, boxes_between, storage_key
from shira.errors import PlacementError

_aten = torch.ops.aten
_CONSTANT = {_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default}
_SAME_VALUES = {_aten._to_copy.default, _aten.clone.default}


class Model(Protocol):
    """A model with the loader of its checkpoint, as every model of vLLM is."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Put each named weight of a checkpoint where the model keeps it."""

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Return all modules with their paths, as `nn.Module.named_modules`."""


@dataclass(frozen=True)
class Storage:
    """A storage of the model as one 1-D weight, whatever parameters are views of it."""

    key: int  # one number for each storage; by it alone two of these are equal
    name: str = field(compare=False)  # the model's, of the first parameter or buffer in it
    weight: Tensor = field(compare=False)  # (n,): all of it


class Placement(NamedTuple):
    """A part of a checkpoint's weight and where this process keeps it."""

    storage: Storage
    box: Box


def trace(
    model: Model, name: str, shape: Sequence[int], dtype: torch.dtype
) -> tuple[Placement, ...]:
    """Return the places where a model keeps the weight that its checkpoint calls ``name``.

    None if this process keeps no part of it (another stage of a pipeline does, or the loader skips
    the name); `PlacementError` if the loader does not take it, or not verbatim. Nothing is written.
    """
    probe = torch.empty(tuple(shape), dtype=dtype, device="meta")
    before = list(_tensors_of(model))
    recorder = _Recorder(name, probe, {storage_key(each.data) for each in before})
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
    names = {storage_key(each.data): each.path for each in reversed(before)}
    found: dict[Placement, None] = {}  # a loader may copy the same part twice
    for target, source in recorder.copies:
        try:
            boxes = boxes_between(source, target)
        except ValueError as error:
            raise PlacementError(f"the loader of {name!r} does not place it: {error}") from error
        storage = _storage_of(target, names[storage_key(target)])
        found.update({Placement(storage, box): None for box in boxes})
    return tuple(found)


def storages_of(model: Model) -> dict[int, Storage]:
    """Return every storage of a model once, by its key, in the order of its modules."""
    found: dict[int, Storage] = {}
    for each in _tensors_of(model):
        if storage_key(each.tensor) not in found:
            found[storage_key(each.tensor)] = _storage_of(each.tensor, each.path)
    return found


def _storage_of(tensor: Tensor, name: str) -> Storage:
    entries = tensor.untyped_storage().nbytes() // tensor.element_size()
    return Storage(storage_key(tensor), name, tensor.detach().as_strided((entries,), (1,), 0))


def storage_keys(model: Model) -> set[int]:
    """Return the keys of a model's storages."""
    return {storage_key(each.tensor) for each in _tensors_of(model)}


class _Recorder(TorchDispatchMode):
    """Record copies of views of the probe into the model; no write to the model happens."""

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
        if any(map(self._is_probe, tree_leaves(args))) and not any(
            map(self._is_probe, tree_leaves(out))
        ):
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

    def _is_probe(self, value: object) -> bool:
        return isinstance(value, Tensor) and storage_key(value) == self.probe

    def _refuse(self, why: str) -> PlacementError:
        return PlacementError(
            f"the model does not keep {self.name!r} as its checkpoint has it, so single entries "
            f"cannot be exchanged (a quantized, cast or derived weight?): in loading, {why}"
        )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """Yield the tensor arguments that an operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class _InPlace(NamedTuple):
    """A parameter or buffer as it was: its path, the dict that holds it, and its memory."""

    path: str
    where: dict[str, Any]
    name: str
    tensor: Tensor
    data: Tensor


def _tensors_of(model: Model) -> Iterator[_InPlace]:
    """Yield every parameter and buffer that has memory, tied ones as often as they occur."""
    for path, module in model.named_modules():
        for where in (module._parameters, module._buffers):
            for name, tensor in where.items():
                if tensor is not None and not is_lazy(tensor):
                    yield _InPlace(f"{path}.{name}".lstrip("."), where, name, tensor, tensor.data)


def _put_back(before: list[_InPlace]) -> str:
    """Undo the replacement of whole parameters; return the name of the last one, if any was."""
    replaced = ""
    for _, where, name, tensor, data in before:
        if where.get(name) is not tensor or storage_key(tensor) != storage_key(data):
            where[name] = tensor
            tensor.data = data
            replaced = name
    return replaced
