# SPDX-License-Identifier: Apache-2.0
"""Supports made of square blocks: from the blocks to the entries, and from the entries back.

A block mask chooses ``b x b`` blocks of a weight's block grid. Whoever knows that can do better
than entry by entry: train with a batched matrix product over just the chosen blocks, store block
ids instead of positions. A `Support` does not say where it comes from, so `block_layout` finds the
blocks in it, and `support_of_blocks` is its inverse. Sits on ``support``; pure functions of plain
values; all costs are O(k).

::

    b = 3, blocks (0, 2), (1, 0) and, cut to 4 entries, (0, 1)

    . . . 1 1 1 1 1 1
    . . . 1 . . 1 1 1
    . . . . . . 1 1 1
    1 1 1 . . . . . .
    1 1 1 . . . . . .      <- the grid ends here: blocks at the edge are smaller
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.errors import SupportError
from shira.support import Support, matrix_shape

CANDIDATES = (256, 128, 64, 32, 16, 8)
"""Block sizes that `block_layout` looks for, largest first."""

_PREFIX = 4096  # entries looked at first: an unstructured support is turned away by them alone


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The blocks of a support.

    Block ``i`` covers these rows and columns of the weight::

        row_block[i] * b : min((row_block[i] + 1) * b, rows)
        col_block[i] * b : min((col_block[i] + 1) * b, cols)

    All blocks are whole, but for the last one if ``cut`` is not None. The whole ones come in
    row-major order of the block grid; a cut one stands last, wherever in the grid it is.
    """

    shape: tuple[int, int]
    """Rows and columns of the weight, seen as a matrix of ``shape[0]`` rows."""
    block_size: int
    """b."""
    row_block: Tensor
    """int64 ``(blocks,)``: row in the block grid of ``ceil(rows / b)`` rows."""
    col_block: Tensor
    """int64 ``(blocks,)``: column in the block grid of ``ceil(cols / b)`` columns."""
    cut: int | None
    """How many entries of the last block there are, in row-major order inside the block: its first
    rows and the beginning of the next. At least 1 and fewer than the block has; None: all of them.
    """

    def __len__(self) -> int:
        """How many blocks, a cut one included."""
        return self.row_block.numel()

    @property
    def nnz(self) -> int:
        """How many entries."""
        heights, widths = self.extents()
        sizes = heights * widths
        if self.cut is not None:
            sizes[-1] = self.cut
        return int(sizes.sum())

    @property
    def regular(self) -> bool:
        """Whether every block covers b x b entries of the weight: none is at a ragged edge."""
        heights, widths = self.extents()
        return bool((heights == self.block_size).all() and (widths == self.block_size).all())

    def extents(self) -> tuple[Tensor, Tensor]:
        """Rows and columns that each block covers, cut or not: int64 ``(blocks,)`` twice."""
        b, (rows, cols) = self.block_size, self.shape
        return (
            (rows - self.row_block * b).clamp_(max=b),
            (cols - self.col_block * b).clamp_(max=b),
        )

    def ids(self) -> Tensor:
        """int64 ``(blocks,)``: row-major number of each block in the block grid."""
        return self.row_block * _grid(self.shape, self.block_size)[1] + self.col_block

    def positions(self, support: Support) -> Tensor:
        """Where the entries of the support stand in a ``(blocks, b, b)`` tensor of the blocks.

        ``blocks.view(-1)[positions]`` are the support's values in its own order. O(k).

        Args:
            support: The one that has this layout.

        Returns:
            int64 ``(k,)`` on the support's device.
        """
        b, cols = self.block_size, self.shape[1]
        ids = self.ids()
        known, order = ids.sort()
        flat = support.indices.long()
        row, col = flat // cols, flat % cols
        wanted = row // b * _grid(self.shape, b)[1] + col // b
        block = order[torch.searchsorted(known, wanted)]
        return (block * b + row % b) * b + col % b


def support_of_blocks(
    shape: Sequence[int], block_size: int, ids: Tensor, cut: int | None = None
) -> Support:
    """The entries of some blocks.

    Args:
        shape: Shape of the weight as stored; more than two dimensions count as a matrix of
            ``shape[0]`` rows.
        block_size: b.
        ids: Integers ``(blocks,)``: different row-major numbers in the block grid, in any order.
        cut: Take only so many entries of the last of the ids; None: all.

    Returns:
        A support on the device of ``ids``.

    Raises:
        SupportError: If an id is out of range or occurs twice, or the cut is no part of its block.
    """
    rows, cols = matrix_shape(shape)
    b, ids = int(block_size), ids.long()
    if b < 1:
        raise SupportError(f"a block size is at least 1, not {block_size}")
    down, across = _grid((rows, cols), b)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < down * across:
        raise SupportError(
            f"block ids are in [0, {down * across}), the grid of {b} x {b} blocks on a weight of "
            f"shape {tuple(shape)}; they go from {int(ids.min())} to {int(ids.max())}"
        )
    if bool((torch.diff(ids.sort().values) == 0).any()):
        raise SupportError("a block id occurs twice")
    layout = BlockLayout((rows, cols), b, ids // max(across, 1), ids % max(across, 1), cut)
    heights, widths = layout.extents()
    if cut is not None:
        whole = int(heights[-1] * widths[-1]) if ids.numel() else 0
        if not 0 < cut < whole:
            raise SupportError(
                f"the last block has {whole} entries, so a cut leaves 1 to {whole - 1} of them, "
                f"not {cut}"
            )
        heights[-1] = -(-cut // int(widths[-1]))
    # Segments: one row of one block each, k / b of them. They alone are sorted.
    block = torch.repeat_interleave(heights)
    inside = torch.arange(block.numel(), device=ids.device) - _starts(heights)[block]
    start = (layout.row_block[block] * b + inside) * cols + layout.col_block[block] * b
    width = widths[block]
    if cut is not None:
        width[-1] = cut - (int(heights[-1]) - 1) * int(widths[-1])
    start, order = start.sort()
    width = width[order]
    if ids.numel() and bool((width == b).all()):
        flat = (start[:, None] + torch.arange(b, device=ids.device)).view(-1)
    else:
        flat = torch.repeat_interleave(start - _starts(width), width)
        flat += torch.arange(flat.numel(), device=ids.device)
    return Support._trusted(tuple(shape), flat)


def block_layout(support: Support, candidates: Sequence[int] = CANDIDATES) -> BlockLayout | None:
    """The blocks of which a support is made, if it is made of blocks.

    The support has to be exactly whole ``b x b`` blocks of the block grid (smaller ones at the
    edges of a weight whose sizes are no multiples of b), and at most one block of which only a
    row-major beginning is there. ``support_of_blocks(support.shape, layout.block_size,
    layout.ids(), layout.cut)`` is then the support again.

    O(k); a support without structure is turned away after its first few thousand entries. Nothing
    is cached: keep the answer as long as the support.

    Args:
        support: On any device.
        candidates: Block sizes to look for; the largest that fits is taken (blocks of 64 are also
            blocks of 32, unless one of them is cut).

    Returns:
        The layout, its tensors on the support's device; None for a support that is not of this
        form for any of the candidates, and for an empty one.
    """
    rows, cols = matrix_shape(support.shape)
    if not support.nnz:
        return None
    indices = support.indices
    head = indices[_run_starts(indices[:_PREFIX], cols)].long() % cols
    sizes = [b for b in sorted(set(candidates), reverse=True) if b > 0]
    sizes = [b for b in sizes if not bool((head % b).any())]
    if not sizes:
        return None
    at = _run_starts(indices, cols)
    start = indices[at].long()
    length = torch.diff(at, append=at.new_tensor([support.nnz]))
    for b in sizes:
        layout = _layout((rows, cols), b, start // cols, start % cols, length)
        if layout is not None:
            return layout
    return None


def _layout(
    shape: tuple[int, int], b: int, row: Tensor, col: Tensor, length: Tensor
) -> BlockLayout | None:
    """The layout for one block size, from the runs of entries: row, first column, length."""
    across = _grid(shape, b)[1]
    if bool((col % b).any()):
        return None
    end = col + length
    odd = ((end % b != 0) & (end != shape[1])).nonzero().view(-1)
    if odd.numel() > 1:
        return None
    # Segments: one row of one block each. At most one is not whole: the last row of the cut block.
    count = (length + b - 1) // b
    run = torch.repeat_interleave(count)
    inside = torch.arange(run.numel(), device=row.device) - _starts(count)[run]
    seg_row, seg_col = row[run], col[run] // b + inside
    key = seg_row // b * across + seg_col
    cut_id, partial, partial_row = -1, 0, 0
    if odd.numel():
        last = int(_starts(count)[odd] + count[odd]) - 1
        cut_id, partial = int(key[last]), int(end[odd]) % b
        partial_row = int(seg_row[last]) % b
        keep = torch.arange(run.numel(), device=row.device) != last
        key, seg_row = key[keep], seg_row[keep]
    ids, heights = torch.unique(key, return_counts=True)
    short = (heights < (shape[0] - ids // across * b).clamp_(max=b)).nonzero().view(-1)
    if short.numel() > 1:
        return None
    full_rows = 0
    if short.numel():
        short_id, full_rows = int(ids[short]), int(heights[short])
        if cut_id not in (-1, short_id):
            return None
        cut_id = short_id
        # as many different rows as this, the highest of them: they are the first ones
        if int((seg_row[key == cut_id] % b).max()) != full_rows - 1:
            return None
        ids = ids[ids != cut_id]
    elif cut_id >= 0 and bool((ids == cut_id).any()):
        return None
    if partial and partial_row != full_rows:
        return None
    cut = None
    if cut_id >= 0:
        cut = full_rows * min(b, shape[1] - cut_id % across * b) + partial
        ids = torch.cat((ids, ids.new_tensor([cut_id])))
    return BlockLayout(shape, b, ids // across, ids % across, cut)


def _run_starts(indices: Tensor, cols: int) -> Tensor:
    """Positions at which a run of neighbouring entries of one row begins; the first is 0."""
    breaks = torch.ones(indices.numel(), dtype=torch.bool, device=indices.device)
    torch.ne(indices[1:] - indices[:-1], 1, out=breaks[1:])
    breaks |= indices % cols == 0
    return breaks.nonzero().view(-1)


def _starts(counts: Tensor) -> Tensor:
    """Exclusive sums: where each group begins."""
    return counts.cumsum(0) - counts


def _grid(shape: tuple[int, int], b: int) -> tuple[int, int]:
    """Rows and columns of the block grid."""
    return math.ceil(shape[0] / b), math.ceil(shape[1] / b)
