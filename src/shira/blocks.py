# SPDX-License-Identifier: Apache-2.0
"""Supports made of blocks: from the blocks to the entries, and from the entries back.

A weight seen as a matrix is cut into blocks of ``height`` rows and ``width`` columns (smaller ones
at the lower and right edge), numbered row by row. Whoever knows that a support is the entries of
some of them can do better than entry by entry: train with a batched matrix product over just the
chosen blocks, store their numbers instead of positions. A `Support` does not say where it comes
from, so the blocks are found in its indices alone, whichever mask made it:

- `block_layout` finds square blocks that are all of it, `support_of_blocks` is the inverse: for
  training. One block may be cut, as the budget of a block mask cuts its last.
- `find_blocks` finds blocks of any size and the entries beside them, `expand` is the inverse: for
  files.

::

    b = 3, blocks (0, 2), (1, 0) and, cut to 4 entries, (0, 1)

    . . . 1 1 1 1 1 1
    . . . 1 . . 1 1 1
    . . . . . . 1 1 1
    1 1 1 . . . . . .
    1 1 1 . . . . . .      <- the grid ends here: blocks at the edge are smaller

Sits on ``support``; pure functions of plain values; all costs are O(k).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.errors import SupportError
from shira.support import Support, index_dtype, matrix_shape

CANDIDATES = (256, 128, 64, 32, 16, 8)
"""Block sizes that `block_layout` looks for, largest first."""

_PREFIX = 4096  # entries looked at first: an unstructured support is turned away by them alone
_SIDES = tuple(2**i for i in range(2, 11))  # square blocks that are looked for in a file
_LEAST = 2.0  # mean length of the runs along rows below which there are no blocks to look for
_PIECE = 2**14  # entries that are written at a time

Ints = NDArray[np.signedinteger[Any]]
Longs = NDArray[np.int64]


class Blocks(NamedTuple):
    """Some blocks of a matrix and the entries beside them.

    Attributes:
        size: Height and width of a block.
        numbers: int64, increasing: which blocks.
        rest: Flat indices, increasing, none in one of the blocks.
    """

    size: tuple[int, int]
    numbers: Longs
    rest: Ints


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
    """The number of entries that the last block has, in row-major order inside the block: its
    first rows and the beginning of the next. At least 1 and fewer than a whole block; None: all.
    """

    def __len__(self) -> int:
        """Return how many blocks there are, a cut one included."""
        return self.row_block.numel()

    @property
    def nnz(self) -> int:
        """Entries in all."""
        heights, widths = self.extents()
        sizes = heights * widths
        return int(sizes.sum() if self.cut is None else sizes[:-1].sum() + self.cut)

    @property
    def regular(self) -> bool:
        """True if every block covers b x b entries of the weight: none is at a ragged edge."""
        return all(bool((sides == self.block_size).all()) for sides in self.extents())

    def extents(self) -> tuple[Tensor, Tensor]:
        """Return the rows and columns that each block covers, cut or not: int64 ``(blocks,)``."""
        b, (rows, cols) = self.block_size, self.shape
        return (rows - self.row_block * b).clamp(max=b), (cols - self.col_block * b).clamp(max=b)

    def ids(self) -> Tensor:
        """Return the row-major number of each block in the block grid: int64 ``(blocks,)``."""
        return self.row_block * grid((self.block_size,) * 2, self.shape)[1] + self.col_block

    def positions(self, support: Support) -> Tensor:
        """Return where the support's entries stand in a ``(blocks, b, b)`` tensor of the blocks.

        ``blocks.view(-1)[positions]`` are the support's values in its own order. O(k).

        Args:
            support: The one that has this layout.

        Returns:
            int64 ``(k,)`` on the support's device.
        """
        return self.places(*support.coordinates().long())

    def places(self, row: Tensor, col: Tensor) -> Tensor:
        """Return `positions` for the rows and columns of entries, int64 ``(k,)`` both."""
        b = self.block_size
        known, order = self.ids().sort()
        block = order[torch.searchsorted(known, row // b * grid((b, b), self.shape)[1] + col // b)]
        return (block * b + row % b) * b + col % b


def support_of_blocks(
    shape: Sequence[int], block_size: int, ids: Tensor, cut: int | None = None
) -> Support:
    """Return the entries of some square blocks.

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

    >>> support_of_blocks((4, 6), 2, torch.tensor([1])).indices.tolist()
    [2, 3, 8, 9]
    """
    b, numbers = int(block_size), ids.long().cpu().numpy()
    if b < 1:
        raise SupportError(f"a block size is at least 1, not {block_size}")
    down, across = grid((b, b), shape)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < down * across:
        raise SupportError(
            f"block ids are in [0, {down * across}), the grid of {b} x {b} blocks on a weight of "
            f"shape {tuple(shape)}; they go from {numbers.min()} to {numbers.max()}"
        )
    if len(np.unique(numbers)) < len(numbers):
        raise SupportError("a block id occurs twice")
    rest = np.empty(0, np.int64)
    if cut is not None:
        numbers, last = numbers[:-1], numbers[-1:]
        whole = entries_of((b, b), last, shape).sum()
        if not 0 < cut < whole:
            raise SupportError(
                f"the last block has {whole} entries, so a cut leaves 1 to {whole - 1} of them, "
                f"not {cut}"
            )
        rest = expand(Blocks((b, b), last, rest), shape)[:cut]
    flat = expand(Blocks((b, b), numbers, rest), shape)
    return Support._trusted(shape, torch.from_numpy(flat).to(ids.device))


def block_layout(support: Support, candidates: Sequence[int] = CANDIDATES) -> BlockLayout | None:
    """Return the square blocks of which a support is made, if it is made of such.

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

    >>> block_layout(Support((4, 6), torch.tensor([2, 3, 8, 9])), [2]).ids().tolist()
    [1]
    """
    rows, cols = matrix_shape(support.shape)
    if not support.nnz:
        return None
    head = support.indices[:_PREFIX].cpu().numpy()
    columns = _runs(head, np.diff(head) != 1, cols)[0] % cols
    sizes = [b for b in sorted(candidates, reverse=True) if b > 0 and not (columns % b).any()]
    if not sizes:
        return None
    indices = support.indices.cpu().numpy()
    starts, lengths = _runs(indices, np.diff(indices) != 1, cols)
    for b in sizes:
        _, numbers, rest = _blocks_of_size((b, b), (rows, cols), starts, lengths)
        if len(rest):  # has to be the beginning of one block
            cut_one = _block_of(rest[:1], (b, b), (rows, cols))
            whole = expand(Blocks((b, b), cut_one, rest[:0]), (rows, cols))
            if not np.array_equal(whole[: len(rest)], rest):
                continue
            numbers = np.concatenate((numbers, cut_one))
        ids = torch.from_numpy(numbers).to(support.indices.device)
        across = grid((b, b), (rows, cols))[1]
        return BlockLayout((rows, cols), b, ids // across, ids % across, len(rest) or None)
    return None


def find_blocks(shape: Sequence[int], indices: Ints) -> Blocks | None:
    """Return the blocks that hold most of a support, or None if it is not made of blocks."""
    rows, cols = matrix_shape(shape)
    if not len(indices):
        return None
    breaks = indices[1:] - indices[:-1] != 1
    # An unstructured support goes no further. (Where a row ends a run does too: there are more.)
    if len(indices) < min(_LEAST, cols) * (1 + np.count_nonzero(breaks)):
        return None
    starts, lengths = _runs(indices, breaks, cols)
    if len(indices) < min(_LEAST, cols) * len(starts):
        return None
    for size in _sizes(rows, cols, starts, lengths):
        if size[0] * size[1] <= 2:
            continue  # more than half as many as there are entries
        blocks = _blocks_of_size(size, (rows, cols), starts, lengths)
        if len(blocks.numbers) + 2 * len(blocks.rest) < len(indices) / 2:  # about its bytes
            return blocks
    return None


def grid(size: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    """Return how many blocks there are from top to bottom and from left to right."""
    rows, cols = matrix_shape(shape)
    return -(-rows // size[0]), -(-cols // size[1])


def entries_of(size: tuple[int, int], numbers: Longs, shape: Sequence[int]) -> Longs:
    """Return how many entries each block has; O(number of blocks)."""
    heights, widths = _extents(size, numbers, shape)
    return heights * widths


def expand(blocks: Blocks, shape: Sequence[int]) -> Ints:
    """Return the flat indices of blocks and a rest in range: int32 where the weight allows.

    They increase, unless an entry of the rest is in one of the blocks.
    """
    rows, cols = matrix_shape(shape)
    heights, widths = _extents(blocks.size, blocks.numbers, shape)
    down, across = np.divmod(blocks.numbers, max(1, grid(blocks.size, shape)[1]))
    corner = down * blocks.size[0] * cols + across * blocks.size[1]
    # One run for each row of each block and for each entry of the rest, brought into order; then
    # the entries of each run.
    starts = np.repeat(corner, heights) + cols * _counting(heights)
    starts = np.concatenate((starts, blocks.rest))
    lengths = np.concatenate((np.repeat(widths, heights), np.ones(len(blocks.rest), np.int64)))
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    wide = index_dtype(rows * cols) == torch.int64
    out = np.empty(int(lengths.sum()), np.int64 if wide else np.int32)
    at = 0
    step = max(1, _PIECE // min(blocks.size[1], max(1, cols)))
    for low in range(0, len(starts), step):
        part = lengths[low : low + step]
        count = int(part.sum())
        out[at : at + count] = np.repeat(starts[low : low + step], part) + _counting(part)
        at += count
    return out


def _block_of(indices: Ints, size: tuple[int, int], shape: Sequence[int]) -> Longs:
    """Return the number of the block that each entry is in."""
    row, column = np.divmod(indices.astype(np.int64), matrix_shape(shape)[1])
    numbers: Longs = row // size[0] * grid(size, shape)[1] + column // size[1]
    return numbers


def _counting(lengths: Longs) -> Longs:
    """Return ``0, 1, ..., n - 1`` for each n in ``lengths``."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)


def _extents(size: tuple[int, int], numbers: Longs, shape: Sequence[int]) -> tuple[Longs, Longs]:
    """Return the height and width of each block: those at the edges may be smaller."""
    rows, cols = matrix_shape(shape)
    down, across = np.divmod(numbers, max(1, grid(size, shape)[1]))
    return np.minimum(size[0], rows - down * size[0]), np.minimum(size[1], cols - across * size[1])


def _runs(indices: Ints, breaks: NDArray[np.bool_], cols: int) -> tuple[Longs, Longs]:
    """Return start and length of each run of neighbours within a row."""
    at = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    starts, lengths = indices[at].astype(np.int64), np.diff(at, append=len(indices))
    # A run may go on in the next row, and in the one after it.
    row = starts // cols
    rows = (starts + lengths - 1) // cols - row + 1
    if (rows == 1).all():
        return starts, lengths
    row = np.repeat(row, rows) + _counting(rows)
    ends = np.minimum(np.repeat(starts + lengths, rows), (row + 1) * cols)
    starts = np.maximum(np.repeat(starts, rows), row * cols)
    return starts, ends - starts


def _sizes(rows: int, cols: int, starts: Longs, lengths: Longs) -> Iterator[tuple[int, int]]:
    """Yield sizes of blocks to try, best first: squares, then what the commonest runs suggest."""
    column = starts % cols
    ends = column + lengths
    for side in sorted(_SIDES, reverse=True):
        aligned = (column % side == 0) & ((ends % side == 0) | (ends == cols))
        if side <= rows and 2 * np.count_nonzero(aligned) > len(starts):
            yield side, side
    width = int(np.bincount(np.minimum(lengths, 2**16)).argmax())
    if width < 2**16:
        yield _commonest_stack(starts[lengths == width], cols), width
    yield 1, cols


def _commonest_stack(starts: Longs, cols: int) -> int:
    """Return how many runs stand below one another most often."""
    row, column = np.divmod(starts, cols)
    order = np.lexsort((row, column))
    row, column = row[order], column[order]
    new = np.ones(len(starts), bool)
    new[1:] = (np.diff(column) != 0) | (np.diff(row) != 1)
    heights = np.diff(np.flatnonzero(new), append=len(starts))
    return int(np.bincount(heights).argmax())


def _blocks_of_size(
    size: tuple[int, int], shape: tuple[int, int], starts: Longs, lengths: Longs
) -> Blocks:
    (height, width), cols = size, shape[1]
    down, across = grid(size, shape)
    row, column = np.divmod(starts, cols)
    ends = column + lengths
    # The rows of blocks that a run covers from end to end, and how many of each block there are.
    low, high = -(-column // width), np.where(ends == cols, across, ends // width)
    covered = np.maximum(high - low, 0)
    block = np.repeat(row // height * across + low, covered) + _counting(covered)
    if down * across > 4 * len(block):
        numbers, inverse, counts = np.unique(block, return_inverse=True, return_counts=True)
    else:
        numbers, inverse = np.arange(down * across), block
        counts = np.bincount(block, minlength=down * across)
    full = counts == _extents(size, numbers, shape)[0]
    # What is left is in runs that begin or end within a block, or cover a row of one not full.
    owner = np.repeat(np.arange(len(starts)), covered)
    whole = np.bincount(owner, weights=full[inverse], minlength=len(starts)) == covered
    whole &= (column % width == 0) & ((ends % width == 0) | (ends == cols))
    lengths = lengths[~whole]
    rest = np.repeat(starts[~whole], lengths) + _counting(lengths)
    return Blocks(size, numbers[full], rest[~np.isin(_block_of(rest, size, shape), numbers[full])])
