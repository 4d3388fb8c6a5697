# SPDX-License-Identifier: Apache-2.0
"""`SparseDelta` and `Adapter`: adapters as plain values.

A `SparseDelta` is a `Support` with a value for each of its entries; an `Adapter` maps the base
model's own parameter names to one each, and carries metadata and the tensors that were trained
whole beside them (a new head). Neither knows of ``nn.Module`` or PEFT; files are read and written
by ``shira.store``, which `Adapter.load`, `Adapter.save` and `Adapter.from_model` call.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from shira.base import accumulation_dtype, replacement
from shira.errors import AdapterError, UnknownAdapterError, did_you_mean
from shira.operators import Operators
from shira.support import Support

if TYPE_CHECKING:
    from shira.checkpoints import Base


class SparseDelta:
    """What an adapter adds to one weight.

    Args:
        support: Which entries.
        values: ``(k,)`` floating point, one for each index, on the support's device.

    Raises:
        AdapterError: If the values are not 1-D floating point of the support's length.
    """

    __slots__ = ("support", "values")

    def __init__(self, support: Support, values: Tensor) -> None:
        if not values.is_floating_point():
            raise AdapterError(f"values are floating point, not {values.dtype}")
        if values.dim() != 1 or values.numel() != support.nnz:
            raise AdapterError(
                f"{support.nnz} positions need values of shape ({support.nnz},), "
                f"not {tuple(values.shape)}"
            )
        self.support = support
        self.values = values

    @property
    def nnz(self) -> int:
        """How many entries."""
        return self.support.nnz

    def replacement(self, base: Tensor, scale: float = 1.0) -> Tensor:
        """The values that take the place of the base's: ``round(base + scale * values)``.

        The sum is made in float32 (float64 if base or values are) and rounded once, to the base's
        dtype.

        Args:
            base: ``(k,)`` values of the base weight at the support.
            scale: Factor on the delta.

        Returns:
            ``(k,)`` in the dtype of ``base``.
        """
        if scale == 1.0:
            return replacement(base, self.values)
        wide = accumulation_dtype(base.dtype, self.values.dtype)
        return replacement(base, self.values.to(wide) * scale)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return (
            self.support == other.support
            and self.values.dtype == other.values.dtype
            and torch.equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def __repr__(self) -> str:
        return f"SparseDelta({self.support!r}, {self.values.dtype})"


class Adapter(Operators, Mapping[str, SparseDelta]):
    """`{parameter name: SparseDelta}` with metadata; the operators are in `shira.operators`.

    As a mapping it has the deltas alone; `tensors` are beside them.

    Args:
        deltas: By the base model's own parameter name, e.g. ``model.layers.0.mlp.up_proj.weight``.
        metadata: Anything that JSON can hold: mask, seed, base model, fingerprint.
        tensors: Whole tensors that take the place of the base's, by the base model's own name of
            the parameter or buffer: what was trained under ``modules_to_save``.

    Raises:
        AdapterError: If a name or value is of another type, or a name has both a delta and a
            tensor.
    """

    __slots__ = ("_deltas", "metadata", "tensors")

    tensors: dict[str, Tensor]

    def __init__(
        self,
        deltas: Mapping[str, SparseDelta],
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        for name, delta in deltas.items():
            if not isinstance(name, str) or not isinstance(delta, SparseDelta):
                raise AdapterError(
                    f"an adapter maps parameter names to SparseDelta, not {name!r} to "
                    f"{type(delta).__name__}"
                )
        for name, tensor in (tensors or {}).items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise AdapterError(
                    f"whole tensors are given by parameter name, not {name!r} as "
                    f"{type(tensor).__name__}"
                )
            if name in deltas:
                raise AdapterError(
                    f"{name!r} has a delta and a whole tensor; a parameter is changed in one way"
                )
        self._deltas = dict(deltas)
        self.metadata = dict(metadata or {})
        self.tensors = {name: tensor.detach() for name, tensor in (tensors or {}).items()}

    def __getitem__(self, name: str) -> SparseDelta:
        try:
            return self._deltas[name]
        except KeyError:
            raise UnknownAdapterError(
                f"the adapter has no parameter {name!r}.{did_you_mean(name, self._deltas)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._deltas

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def nnz(self) -> int:
        """Entries in all."""
        return sum(delta.nnz for delta in self._deltas.values())

    @property
    def density(self) -> float:
        """Entries over the entries of the weights they stand in."""
        numel = sum(delta.support.numel for delta in self._deltas.values())
        return self.nnz / numel if numel else 0.0

    def __eq__(self, other: object) -> bool:
        """Equal deltas and whole tensors, bit for bit; metadata does not count."""
        if not isinstance(other, Adapter):
            return NotImplemented
        return (
            self._deltas == other._deltas
            and self.tensors.keys() == other.tensors.keys()
            and all(same_tensor(t, other.tensors[name]) for name, t in self.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def __repr__(self) -> str:
        whole = f", {len(self.tensors)} whole tensors" if self.tensors else ""
        return f"Adapter({len(self)} parameters, nnz={self.nnz}, density={self.density:.4g}{whole})"

    def require_sparse(self, what: str) -> None:
        """Refuse an adapter with whole tensors, for what knows deltas alone.

        Args:
            what: The subject of the message: ``"a patch file"``.

        Raises:
            AdapterError: If it has some; names them.
        """
        if self.tensors:
            raise AdapterError(
                f"{what} cannot hold whole tensors, and the adapter has {listed(self.tensors)} "
                "(trained under modules_to_save). adapter.restrict(list(adapter)) is the adapter "
                "without them, which computes something else"
            )

    def require_scale_one(self, name: str, scale: float) -> None:
        """Refuse whole tensors at another scale than 1: they have none.

        Args:
            name: What to call the adapter.
            scale: At which it would be used.

        Raises:
            AdapterError: If it has some, and the scale is another.
        """
        if self.tensors and scale != 1.0:
            raise AdapterError(
                f"{name} has whole tensors ({listed(self.tensors)}), which have no scale, so it is "
                f"used at 1 and not at {scale:g}; adapter.restrict(list(adapter)) is the adapter "
                "without them"
            )

    @classmethod
    def from_model(cls, model: torch.nn.Module, adapter_name: str = "default") -> Adapter:
        """The named adapter of a PEFT model (or of a model with injected SHiRA layers), as a value.

        The values are copies; training on changes nothing of the result. Modules that the adapter
        trains whole (``modules_to_save``) become its `tensors`.

        Raises:
            UnknownAdapterError: If no layer of the model has an adapter of this name.
        """
        from shira.store.extract import adapter_of_model

        return adapter_of_model(model, adapter_name)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        base: Base | None = None,
        mapped: bool = False,
    ) -> Adapter:
        """Read an adapter, whatever its format: a compact file, or a folder in PEFT's.

        Everything is validated before it is returned. Memory is in proportion to the adapter.

        Args:
            path: A compact file or a folder with an ``adapter.safetensors``; or a folder in PEFT's
                format or its ``adapter_model.safetensors``.
            base: Where the shapes of the base's weights are known from, if the file does not record
                them (stock PEFT's do not): the ``nn.Module``, the path or hub name of a safetensors
                checkpoint (only headers are read; its names may have another prefix), or
                ``{parameter name: shape}``.
            mapped: Leave the values of a compact file in it, mapped into memory without a copy. The
                file must then not be written to in place as long as the adapter lives; replacing
                it as a whole, as `save` does, is safe.

        Raises:
            FileNotFoundError: If there is nothing at ``path``.
            FileFormatError: If the file is damaged, hostile or no adapter, or needs ``base``.
            WrongBaseError: If the file records other shapes than ``base`` has, or a checkpoint
                lacks a parameter.
        """
        from shira.checkpoints import shapes_of
        from shira.store import load

        known = None if base is None else partial(shapes_of, base)
        return load(path, shapes_of=known, mapped=mapped)

    def save(
        self,
        path: str | os.PathLike[str],
        format: Literal["compact", "peft"] = "compact",
        dtype: torch.dtype | None = None,
        indices: Literal["gaps", "blocks", "seed"] | None = None,
    ) -> None:
        """Write the adapter, atomically: the old file or the new one is there, never half.

        Args:
            path: A file for ``"compact"``; in a folder that is there already, the file
                ``adapter.safetensors``. A folder, made if absent, for ``"peft"``.
            format: ``"compact"``: one safetensors file, at 2 % density 3 bytes an entry with
                bfloat16 values (``docs/file-format.md``). ``"peft"``: ``adapter_config.json`` and
                ``adapter_model.safetensors``, which stock PEFT loads.
            dtype: Dtype of the stored values; ``None`` keeps theirs. ``torch.int8`` (compact only)
                keeps a scale for each parameter and loads as float32, within half a step. Whole
                tensors keep their dtype.
            indices: How a compact file stores them: as ``"gaps"``, as the numbers of ``"blocks"``,
                or as the ``"seed"`` of a random mask; ``None`` takes the smallest that is exact.

        Raises:
            ConfigError: If the format is unknown, or does not store this dtype or indices so.
            AdapterError: If the format cannot hold the adapter.
        """
        from shira.store import save

        save(self, path, format=format, dtype=dtype, indices=indices)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and equal values, on any devices."""
    return a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def listed(names: Iterable[str]) -> str:
    """Return some names for a message: the first three, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def checked_scale(adapter: str, scale: object) -> float:
    """Return the factor on an adapter as a float; the one rule for switching and serving.

    Args:
        adapter: Name of the adapter, for messages.
        scale: An integer, a float, or another real number; not a bool.

    Raises:
        AdapterError: If it is no number, not finite, or too large for a float.
    """
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise AdapterError(f"the scale of {adapter!r} is a number, not {scale!r:.100}")
    try:
        number = float(scale)
    except OverflowError:
        raise AdapterError(f"the scale of {adapter!r} is too large for a float") from None
    if not math.isfinite(number):
        raise AdapterError(f"the scale of {adapter!r} is a finite number, not {number}")
    return number
