# SPDX-License-Identifier: Apache-2.0
"""What an op must know of the active supports, made once and kept: a `Plan`.

Ops get indices as PEFT has them, ``(2, k)`` int32 rows and columns, or `packed`, one tensor for
each active adapter. The plan turns them into offsets into the weight's memory, compressed rows for
the sampled product, and, for several adapters, their union with the place of each one's entries in
it.

`plan_cache` keeps plans as long as the index tensors live. Only positions are kept, never values:
those are read at each use. Of packed positions rows and columns are made at each use: kept, they
would take the memory that packing saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira.blocks import block_layout
from shira.errors import SupportError
from shira.ops import native
from shira.ops.packed import from_gaps, gaps_of, is_packed, support_of
from shira.support import Support, align, matrix_shape


class Tiles(NamedTuple):
    """The square tiles in which all entries of a support lie, row by row."""

    size: int
    row: Tensor
    """int32 ``(tiles,)``: place of each in the grid of tiles, down."""
    col: Tensor
    """int32 ``(tiles,)``: the same, across."""


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
    """Where the entries of the active supports are, in the order of the weight's rows."""

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
    members: tuple[Tensor, ...] | None
    """For several adapters: int64 ``(k_i,)``, the place of each one's entries in the union."""
    tiles: Tiles | None = None
    """If the support fills square tiles, as those of block masks do."""
    host_crow: list[int] = field(default_factory=list)
    """Where each row's entries begin, as Python integers, filled on first need by what loops over
    rows."""
    ways: dict[Any, str] = field(default_factory=dict)
    """Which backend the weight gradient takes, by what that depends on besides the support and
    its device."""

    def pattern(self) -> Pattern:
        """Rows and columns; of packed positions they are made at each use."""
        if self.kept is not None:
            return self.kept
        assert self.gaps is not None
        kernels = native.load().library
        if kernels is None:
            support = from_gaps(self.gaps.units, self.weight_shape)
            return _pattern(support.coordinates(), self.shape[0])
        crow, row, col = kernels.coordinates(self.gaps, self.shape, True)
        assert row is not None
        return Pattern(crow, row, col)

    def compressed(self) -> tuple[Tensor, Tensor]:
        """`pattern` without the row of each entry: ``crow, col``."""
        if self.kept is not None:
            return self.kept.crow, self.kept.col
        kernels = native.load().library
        if kernels is None or self.gaps is None:
            return self.pattern()[::2]
        crow, _, col = kernels.coordinates(self.gaps, self.shape, False)
        return crow, col

    def flat(self) -> Tensor:
        """int64 ``(k,)``: flat, row-major index of each entry.

        Made at each use: kept, it would take as much memory as the adapter's own indices.
        """
        _, row, col = self.pattern()
        return torch.add(col, row.long(), alpha=self.shape[1])

    def offsets(self) -> Tensor:
        """int64 ``(k,)``: place of each entry in the weight's memory; made at each use."""
        if _is_contiguous(self.weight_shape, self.stride):
            return self.flat()
        flat = self.flat()
        offsets = torch.zeros_like(flat)
        for size, step in zip(reversed(self.weight_shape), reversed(self.stride), strict=True):
            offsets += flat % size * step
            flat = flat // size
        return offsets

    @property
    def density(self) -> float:
        """Entries over the entries of the weight."""
        numel = self.shape[0] * self.shape[1]
        return self.nnz / numel if numel else 0.0

    def combine(self, deltas: Sequence[Tensor]) -> Tensor:
        """One delta on the union from one for each adapter: ``(k,)``; overlapping entries add."""
        if self.members is None:
            return deltas[0]
        wide = torch.float64 if any(d.dtype == torch.float64 for d in deltas) else torch.float32
        total = torch.zeros(self.nnz, dtype=wide, device=self.device)
        for delta, place in zip(deltas, self.members, strict=True):
            total.index_add_(0, place, delta.to(wide))
        return total

    def split(self, values: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
        """The reverse for gradients: ``(k_i,)`` at each adapter's entries, in its delta's dtype."""
        if self.members is None:
            return [values.to(deltas[0].dtype)]
        parts = [values.index_select(0, place) for place in self.members]
        return [part.to(delta.dtype) for part, delta in zip(parts, deltas, strict=True)]


def make_plan(indices: Sequence[Tensor], shape: Sequence[int], stride: Sequence[int]) -> Plan:
    """A plan for these supports on a weight of this shape and memory layout.

    Args:
        indices: ``(2, k_i)`` integers each: rows and columns, sorted by row, then column; or
            packed.
        shape: Shape of the weight.
        stride: Strides of the weight, in entries.

    Raises:
        SupportError: If coordinates are out of range, unsorted or repeated.
    """
    supports = [_support(coordinates, shape) for coordinates in indices]
    union, members = supports[0], None
    if len(supports) > 1:
        union, places = align(supports)
        everywhere = torch.arange(union.nnz, device=union.indices.device)
        members = tuple(everywhere if place is None else place for place in places)
    matrix, device, kept, packed = matrix_shape(shape), union.indices.device, None, None
    if all(map(is_packed, indices)) and device.type == "cpu":
        packed = _alias(indices[0]) if members is None else None
    else:
        alone = members is None and not is_packed(indices[0])
        kept = _pattern(indices[0] if alone else union.coordinates(), matrix[0])
    gaps = gaps_of(union, packed) if device.type == "cpu" else None
    return Plan(
        tuple(shape), tuple(stride), matrix, union.nnz, device, gaps, kept, members, _tiles(union)
    )


def _pattern(coordinates: Tensor, rows: int) -> Pattern:
    row, col = (_alias(half.to(torch.int32)) for half in coordinates)
    crow = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
    crow[1:] = torch.cumsum(torch.bincount(row, minlength=rows), 0)
    return Pattern(crow, row, col)


def _tiles(support: Support) -> Tiles | None:
    layout = block_layout(support)
    if layout is None:
        return None
    return Tiles(layout.block_size, layout.row_block.int(), layout.col_block.int())


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, but no view: a view would keep the key of its own cache entry alive."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _support(coordinates: Tensor, shape: Sequence[int]) -> Support:
    try:
        return support_of(coordinates, shape)
    except SupportError as error:
        raise SupportError(f"the indices of an active adapter are unusable: {error}") from error


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True
