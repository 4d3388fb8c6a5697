# SPDX-License-Identifier: Apache-2.0
"""`Plan`: all that an op needs to know of the active supports, made once and kept.

Ops get indices as PEFT has them, ``(2, k)`` int32 rows and columns, or `packed`, one tensor for
each active adapter. The plan turns them into offsets into the weight's memory, compressed rows for
the sampled product, and, for several adapters, their union with the place of each one's entries in
it.

`plan_for` keeps plans as long as the index tensors live. Only positions are kept, never values:
those are read at each use. Of packed positions rows, columns and places in memory are made at each
use: kept, they would take the memory that packing saved. Of others, as on a GPU, places in memory
are made once, for 8 bytes an entry: each step would spend more launches on them than on the
product.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.blocks import BlockLayout, block_layout
from shira.errors import AdapterError, SupportError
from shira.ops import native
from shira.ops.gaps import gaps_of, is_packed, support_of
from shira.ops.memory import alias_of, offsets_of
from shira.support import align, matrix_shape

T = TypeVar("T")


class Pattern(NamedTuple):
    """Rows and columns of entries that are sorted by row, then column."""

    crow: Tensor
    """int32 ``(rows + 1,)``: where each row's entries begin."""
    row: Tensor
    """int32 ``(k,)``."""
    col: Tensor
    """int32 ``(k,)``."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The places of the entries of the active supports, in the order of the weight's rows."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Of the weight, in entries."""
    shape: tuple[int, int]
    """Rows and columns of the weight seen as a matrix."""
    nnz: int
    """Entries in the union."""
    device: torch.device
    """Of the positions."""
    gaps: native.Gaps | None
    """On the CPU: the entries as the compiled kernels take them."""
    kept: Pattern | None
    """Rows and columns, sharing their memory with the adapter's indices; None if those are packed:
    see `pattern`."""
    members: tuple[Tensor | None, ...] | None
    """For several adapters: int64 ``(k_i,)``, the place of each one's entries in the union; None
    for one that has them all."""
    tiles: BlockLayout | None = None
    """The square tiles that the support fills, as those of block masks do."""
    _memo: dict[Any, Any] = field(default_factory=dict)

    def memo(self, key: Any, make: Callable[..., T], *arguments: Any) -> T:
        """Return what is made of this plan under a key, made once."""
        made: T | None = self._memo.get(key)
        if made is None:
            made = self._memo[key] = make(*arguments)
        return made

    def pattern(self) -> Pattern:
        """Return rows and columns; of packed positions they are made at each use."""
        if self.kept is not None:
            return self.kept
        assert self.gaps is not None
        kernels = native.load().library
        if kernels is None:
            support = support_of(self.gaps.units, self.weight_shape)
            return pattern_of(support.coordinates(), self.shape[0])
        crow, row, col = kernels.coordinates(self.gaps, self.shape, True)
        assert row is not None
        return Pattern(crow, row, col)

    def compressed(self) -> tuple[Tensor, Tensor]:
        """Return the pattern without the row of each entry: ``crow, col``."""
        kernels = native.load().library
        if self.kept is not None or kernels is None:
            return self.pattern()[::2]
        assert self.gaps is not None
        crow, _, col = kernels.coordinates(self.gaps, self.shape, False)
        return crow, col

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return what is made of the positions, kept unless those are packed."""
        return make() if self.kept is None else self.memo(key, make)

    def flat(self) -> Tensor:
        """Return the flat, row-major index of each entry, int64 ``(k,)``."""
        return self.once("flat", self._flat)

    def _flat(self) -> Tensor:
        _, row, col = self.pattern()
        return torch.add(col, row.long(), alpha=self.shape[1])

    def offsets(self) -> Tensor:
        """Return the place of each entry in the weight's memory, int64 ``(k,)``."""
        return self.once("offsets", lambda: offsets_of(self.flat(), self.weight_shape, self.stride))

    def places(self) -> Tensor:
        """Return the place of each entry in ``(tiles, size, size)``, int64 ``(k,)``."""
        return self.once("places", self._places)

    def _places(self) -> Tensor:
        assert self.tiles is not None
        return self.tiles.places(*(half.long() for half in self.pattern()[1:]))

    def combine(self, deltas: Sequence[Tensor]) -> Tensor:
        """Return one delta on the union, ``(k,)``: those of the adapters, added up."""
        for delta, place in zip(deltas, self.members or (None,), strict=True):
            k = self.nnz if place is None else place.numel()
            if delta.numel() != k:  # compiled code would read beyond it
                raise AdapterError(f"{k} positions need as many values, not {delta.numel()}")
        if self.members is None:
            return deltas[0]
        wide = accumulation_dtype(*(delta.dtype for delta in deltas))
        total = torch.zeros(self.nnz, dtype=wide, device=self.device)
        for delta, place in zip(deltas, self.members, strict=True):
            if place is None:
                total += delta
            else:
                total.index_add_(0, place, delta.to(wide))
        return total

    def split(self, values: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients ``(k_i,)`` at each adapter's entries, in its delta's dtype."""
        if self.members is None:
            return [values.to(deltas[0].dtype)]
        parts = [values if at is None else values.index_select(0, at) for at in self.members]
        return [part.to(delta.dtype) for part, delta in zip(parts, deltas, strict=True)]


def make_plan(indices: Sequence[Tensor], shape: Sequence[int], stride: Sequence[int]) -> Plan:
    """Make a plan for these supports on a weight of this shape and memory layout.

    Args:
        indices: ``(2, k_i)`` integers each: rows and columns, sorted by row, then column; or
            packed.
        shape: Of the weight.
        stride: Of the weight, in entries.

    Raises:
        SupportError: If coordinates are out of range, unsorted or repeated.
    """
    try:
        supports = [support_of(coordinates, shape) for coordinates in indices]
    except SupportError as error:
        raise SupportError(f"the indices of an active adapter are unusable: {error}") from error
    union, places = align(supports)
    members = places if len(supports) > 1 else None
    matrix, device, kept, packed = matrix_shape(shape), union.indices.device, None, None
    if all(map(is_packed, indices)) and device.type == "cpu":
        # no view, which would keep the key of the plan's cache entry alive
        packed = alias_of(indices[0]) if members is None else None
    else:
        alone = members is None and not is_packed(indices[0])
        kept = pattern_of(indices[0] if alone else union.coordinates(), matrix[0])
    gaps = gaps_of(union, packed) if device.type == "cpu" else None
    tiles = block_layout(union)
    return Plan((*shape,), (*stride,), matrix, union.nnz, device, gaps, kept, members, tiles)


def pattern_of(coordinates: Tensor, rows: int) -> Pattern:
    """Return the pattern of rows and columns ``(2, k)``; it shares the memory of int32 ones."""
    row, col = (alias_of(half.to(torch.int32)) for half in coordinates)
    crow = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
    crow[1:] = torch.cumsum(torch.bincount(row, minlength=rows), 0)
    return Pattern(crow, row, col)


class _Kept(Generic[T]):
    """A thing made of some index tensors for a key, and what they were then."""

    __slots__ = ("key", "made", "seen")

    def __init__(
        self, made: T, key: Any, tensors: Sequence[Tensor], gone: Callable[[Any], object]
    ) -> None:
        self.made, self.key = made, key
        refs = [weakref.ref(tensors[0], gone), *map(weakref.ref, tensors[1:])]
        self.seen = [(r, t._version, t.data_ptr()) for r, t in zip(refs, tensors, strict=True)]

    def is_of(self, tensors: Sequence[Tensor], key: Any) -> bool:
        """Return whether it was made from these very tensors, as they are now."""
        if self.key != key or len(tensors) != len(self.seen):
            return False
        for (ref, version, pointer), tensor in zip(self.seen, tensors, strict=True):
            if ref() is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                return False
        return True

    def is_current(self) -> bool:
        """Return whether its tensors are all there, and not written to since."""
        tensors = [tensor for ref, _, _ in self.seen if (tensor := ref()) is not None]
        return self.is_of(tensors, self.key)


_KEPT_PER_TENSOR = 8  # combinations of adapters kept for one first adapter


class _MadeOnce(Generic[T]):
    """A function of index tensors and a key, called once for each.

    What it makes is kept as long as the first of the tensors lives, and made anew when one of them
    was written to.
    """

    def __init__(self, make: Callable[[Sequence[Tensor], Any], T]) -> None:
        self._make = make
        # By the first tensor's id, the latest first. Lists are replaced, not changed, so that
        # threads need no lock: two that make one thing at once both get a right one.
        self._kept: dict[int, list[_Kept[T]]] = {}

    def __call__(self, tensors: Sequence[Tensor], key: Any) -> T:
        first = id(tensors[0])
        for kept in self._kept.get(first, ()):
            if kept.is_of(tensors, key):
                return kept.made
        made = self._make(tensors, key)
        if any(t.is_inference() for t in tensors):  # torch does not count writes to them
            return made
        others = [kept for kept in self._kept.get(first, ()) if kept.is_current()]
        kept = _Kept(made, key, tensors, lambda ref: self._kept.pop(first, None))
        self._kept[first] = [kept, *others[: _KEPT_PER_TENSOR - 1]]
        return made


_plans = _MadeOnce(lambda indices, layout: make_plan(indices, *layout))


def plan_for(indices: Sequence[Tensor], shape: Sequence[int], stride: Sequence[int]) -> Plan:
    """Return the plan for some index tensors on a weight, made once.

    It is kept as long as the first of the tensors lives, and made anew when one of them was
    written to. Arguments and errors: see `make_plan`.
    """
    return _plans(indices, (shape, stride))


@_MadeOnce
def places_of(indices: Sequence[Tensor], shape: tuple[int, int]) -> native.Places | None:
    """Return where the entries of several matrices are, one for each tensor of indices, made once.

    Kept as plans are. None if they are not all on the CPU.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
    """
    found = [plan_for([index], shape, (shape[1], 1)).gaps for index in indices]
    gaps = [entries for entries in found if entries is not None]
    return native.Places(gaps) if len(gaps) == len(found) else None
