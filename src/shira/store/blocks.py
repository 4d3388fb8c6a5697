# SPDX-License-Identifier: Apache-2.0
"""Supports made of whole blocks, as the numbers of the blocks.

A weight seen as a matrix is cut into blocks of ``height`` rows and ``width`` columns (smaller ones
at the lower and right edge), numbered row by row. A support is the entries of some of them, and the
*rest*: entries that fill no block, such as what a budget leaves of the last one. Block masks have
square blocks, a ``struct`` mask of rows has blocks of 1 x n.

Whether a support is like that is found from its indices alone, so it does not matter which mask
made it. Costs O(k). Used by ``compact_write`` and ``compact_read``; knows of no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shira.gaps import Ints
from shira.support import matrix_shape

Longs = NDArray[np.int64]

_SIDES = tuple(2**i for i in range(2, 11))  # square blocks that are looked for
_LEAST = 2.0  # mean length of the runs along rows below which there are no blocks to look for


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


def find_blocks(shape: Sequence[int], indices: Ints) -> Blocks | None:
    """The blocks that hold most of a support, or None if it is not made of blocks.

    Args:
        shape: Of the weight.
        indices: ``(k,)`` flat, increasing.
    """
    rows, cols = matrix_shape(shape)
    if not len(indices):
        return None
    starts, lengths = _runs(indices, cols)
    if lengths.mean() < min(_LEAST, cols):
        return None
    for size in _sizes(rows, cols, starts, lengths):
        blocks = _blocks_of_size(size, (rows, cols), starts, lengths)
        if len(blocks.numbers) + 2 * len(blocks.rest) < len(indices) / 2:  # about its bytes
            return blocks
    return None


def grid(size: tuple[int, int], shape: Sequence[int]) -> tuple[int, int]:
    """How many blocks there are from top to bottom and from left to right."""
    rows, cols = matrix_shape(shape)
    return -(-rows // size[0]), -(-cols // size[1])


def entries_in(size: tuple[int, int], numbers: Longs, shape: Sequence[int]) -> int:
    """How many entries the blocks have; O(number of blocks)."""
    heights, widths = _extents(size, numbers, shape)
    return int((heights * widths).sum())


def expand(blocks: Blocks, shape: Sequence[int], out: Ints) -> None:
    """Write the flat indices of the blocks and the rest, in order, into ``out``.

    Args:
        blocks: Whose numbers and rest are in range.
        shape: Of the weight.
        out: Of the length of the support; repeats remain in it if the rest is not beside the
            blocks.
    """
    cols = matrix_shape(shape)[1]
    heights, widths = _extents(blocks.size, blocks.numbers, shape)
    down, across = np.divmod(blocks.numbers, max(1, grid(blocks.size, shape)[1]))
    corner = down * blocks.size[0] * cols + across * blocks.size[1]
    # One run for each row of each block, brought into order; then the entries of each run.
    starts = np.repeat(corner, heights) + cols * _counting(heights)
    lengths = np.repeat(widths, heights)
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    filled = len(out) - len(blocks.rest)
    at = 0
    for low in range(0, len(starts), 2**12):
        part = lengths[low : low + 2**12]
        count = int(part.sum())
        out[at : at + count] = np.repeat(starts[low : low + 2**12], part) + _counting(part)
        at += count
    out[filled:] = blocks.rest
    if len(blocks.rest):
        out.sort(kind="stable")


def _counting(lengths: Longs) -> Longs:
    """``0, 1, ..., n - 1`` for each n in ``lengths``."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)


def _extents(size: tuple[int, int], numbers: Longs, shape: Sequence[int]) -> tuple[Longs, Longs]:
    """Height and width of each block: those at the edges may be smaller."""
    rows, cols = matrix_shape(shape)
    down, across = np.divmod(numbers, max(1, grid(size, shape)[1]))
    return np.minimum(size[0], rows - down * size[0]), np.minimum(size[1], cols - across * size[1])


def _runs(indices: Ints, cols: int) -> tuple[Longs, Longs]:
    """Start and length of each run of neighbours within a row."""
    at = np.flatnonzero(indices[1:] - indices[:-1] != 1) + 1
    at = np.concatenate(([0], at))
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
    """Sizes of blocks worth trying, best first: squares, then what the commonest runs suggest."""
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
    """How many runs stand below one another most often."""
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
    across = grid(size, shape)[1]
    row, column = np.divmod(starts, cols)
    ends = column + lengths
    # The rows of blocks that a run covers from end to end, and how many of each block there are.
    low, high = -(-column // width), np.where(ends == cols, across, ends // width)
    covered = np.maximum(high - low, 0)
    block = np.repeat(row // height * across + low, covered) + _counting(covered)
    numbers, inverse, counts = _tally(block, grid(size, shape))
    full = counts == _extents(size, numbers, shape)[0]
    # What is left is in runs that begin or end within a block, or cover a row of one not full.
    owner = np.repeat(np.arange(len(starts)), covered)
    whole = np.bincount(owner, weights=full[inverse], minlength=len(starts)) == covered
    whole &= (column % width == 0) & ((ends % width == 0) | (ends == cols))
    lengths = lengths[~whole]
    rest = np.repeat(starts[~whole], lengths) + _counting(lengths)
    of_rest = rest // cols // height * across + rest % cols // width
    return Blocks(size, numbers[full], rest[~np.isin(of_rest, numbers[full])])


def _tally(block: Longs, of: tuple[int, int]) -> tuple[Longs, Longs, Longs]:
    """Which blocks there are, where each is among them, and how often each is there."""
    if of[0] * of[1] > 4 * len(block):
        return np.unique(block, return_inverse=True, return_counts=True)
    counts = np.bincount(block, minlength=of[0] * of[1])
    return np.arange(of[0] * of[1]), block, counts


def check_size(size: object) -> tuple[int, int]:
    """Height and width as a file gives them.

    Raises:
        ValueError: If they are no two positive integers that a weight could have.
    """
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and 0 < n < 2**62 for n in size)
    ):
        raise ValueError(f"block is [height, width], not {str(size)[:80]}")
    return size[0], size[1]
