# SPDX-License-Identifier: Apache-2.0
"""The `block` and `block_diagonal` masks: whole ``b x b`` blocks of a weight.

Blocks train with a batched matrix product over just the chosen blocks, and are stored as block ids
(see ``shira.blocks``). The idea of training sub-matrices is that of SMT (arXiv 2405.15525), that of
the diagonal DiaBlo's (arXiv 2506.03230); neither is in the SHiRA paper.

::

    block, b = 2, 10 entries     block_diagonal, b = 2, 4 x 8, 18 entries
    . . 1 1 . . . .              1 1 1 1 . . . .
    . . 1 1 . . . .              1 1 1 1 . . . .
    . . . . 1 1 1 1              1 1 . . 1 1 1 1   <- of block (1, 0) the budget
    . . . . . . 1 1  <- cut      . . . . 1 1 1 1      leaves the first row
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.blocks import entries_of, support_of_blocks
from shira.errors import MaskError, did_you_mean
from shira.masks.budget import check_fits
from shira.masks.random import permute, round_keys
from shira.masks.scored import absolute_product
from shira.masks.topk import BLOCK, check_scored, refuse_nan
from shira.support import Support, matrix_shape

SIZES = (128, 64, 32, 16, 8)
"""The block sizes that are chosen from by default."""

_AT_LEAST = 4  # blocks by default: fewer would leave most rows and columns untouched

SCORES = ("random", "magnitude", "grad", "snip")
"""Scores to choose blocks by; the names are those of the masks that score single entries."""


def block_support(
    shape: Sequence[int],
    k: int,
    *,
    seed: int | None = None,
    name: str = "",
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
    block_size: int | None = None,
    score: str = "random",
) -> Support:
    """Choose ``block_size x block_size`` blocks, k entries in all.

    Blocks are taken in the order of the score until they hold k entries; the last one taken is cut
    where the budget ends: of its entries the first in row-major order are left. Blocks at the lower
    and right edge of a weight whose sizes are no multiples of the block size are smaller. Weights
    of more than two dimensions count as matrices of ``shape[0]`` rows.

    ``random`` evaluates a permutation of the blocks, keyed by seed and name as that of
    `random_support`; O(k). The others sum a score over each block: ``abs(w)`` (``magnitude``),
    ``abs(g)`` (``grad``), ``abs(w * g)`` (``snip``), in float64, some rows at a time: no temporary
    is larger than `topk.BLOCK` entries or ``block_size`` rows. Of blocks of equal score the first
    comes first.

    Args:
        shape: Shape of the weight as stored.
        k: The number of entries.
        seed: Any integer; for ``random``.
        name: The parameter's name, so that two weights of equal shape get independent masks.
        weight: The weight, for ``magnitude`` and ``snip``.
        gradient: Its accumulated gradient, for ``grad`` and ``snip``.
        block_size: Rows and columns of a block. Default: 64, which trains about twice as fast as 32
            (``docs/block-masks.md``), or the next of 32, 16 and 8 of which the budget holds four.
        score: One of `SCORES`.

    Returns:
        A support of exactly k entries, on the CPU.

    Raises:
        MaskError: If k entries do not fit the weight, an option is not possible, or what the score
            needs is missing, holds NaN, no floats, or no values (meta).
    """
    check_fits(shape, k)
    check_options(block_size, score)
    if not k:
        return Support._trusted(shape, torch.empty(0, dtype=torch.int64))
    rows, cols = matrix_shape(shape)
    if block_size is None:
        block_size = next((b for b in SIZES if b <= 64 and _AT_LEAST * b * b <= k), SIZES[-1])
    if score == "random":
        if seed is None:
            raise MaskError("random blocks need a seed")
        down, across = -(-rows // block_size), -(-cols // block_size)
        keys = round_keys(seed, name)
        # As many as would do if none were smaller at an edge, then more as long as they do not.
        largest = min(block_size, rows) * min(block_size, cols)
        ids = np.empty(0, np.int64)
        while (missing := k - int(entries_of((block_size, block_size), ids, shape).sum())) > 0:
            count = min(-(-missing // largest), down * across - ids.size)
            more = permute(ids.size, count, down * across, keys)
            ids = np.concatenate((ids, more.astype(np.int64)))
    else:
        sums = _block_sums(shape, block_size, score, weight, gradient)
        ids = sums.sort(descending=True, stable=True).indices.numpy()
    return _take(shape, k, block_size, ids)


def block_diagonal_support(
    shape: Sequence[int], k: int, *, block_size: int | None = None
) -> Support:
    """Choose the blocks along the weight's diagonal, k entries in all (cf. DiaBlo).

    On a block grid of R x C blocks with C >= R the diagonal of number d holds block
    ``((j * R // C + d) % R, j)`` for each block column j: the blocks that the line from the upper
    left to the lower right corner goes through, moved down by d and round the lower edge. (For
    C < R rows and columns change places.) Number 0 covers each row and each column of the weight;
    where R divides C it is DiaBlo's block diagonal of R blocks. The budget fills the diagonals 0,
    1, 2, ...; where it does not fill one, as few of its blocks as hold the rest are taken, evenly
    spaced, and the last of them is cut. O(k).

    A diagonal takes about ``block_size * max(m, n)`` entries: ``block_size = k / max(m, n)`` spends
    the budget on just one. By default the block size is the largest of 128, 64, 32, 16 and 8 of
    which the budget holds a whole diagonal (8 if none).

    Args:
        shape: Shape of the weight as stored; more than two dimensions count as a matrix of
            ``shape[0]`` rows.
        k: The number of entries.
        block_size: Rows and columns of a block; see above.

    Returns:
        A support of exactly k entries, on the CPU.

    Raises:
        MaskError: If k entries do not fit the weight, or the block size is not possible.
    """
    check_fits(shape, k)
    check_options(block_size)
    if not k:
        return Support._trusted(shape, torch.empty(0, dtype=torch.int64))
    rows, cols = matrix_shape(shape)
    if block_size is None:
        block_size = next((b for b in SIZES if b * max(rows, cols) <= k), SIZES[-1])
    down, across = -(-rows // block_size), -(-cols // block_size)
    short, long = min(down, across), max(down, across)
    step = np.arange(long, dtype=np.int64)
    taken, left = [np.empty(0, np.int64)], k
    for number in range(short):
        other = (step * short // long + number) % short
        ids = other * across + step if down <= across else step * across + other
        sizes = entries_of((block_size, block_size), ids, shape)
        if int(sizes.sum()) < left:
            taken.append(ids)
            left -= int(sizes.sum())
            continue
        taken.append(ids[_spread(sizes, left)])
        break
    return _take(shape, k, block_size, np.concatenate(taken))


def check_options(block_size: Any = None, score: Any = "random") -> None:
    """Refuse options that are not possible."""
    number = isinstance(block_size, int) and not isinstance(block_size, bool)
    if block_size is not None and (not number or block_size < 1):
        raise MaskError(f"block_size is a positive integer, not {block_size!r}")
    if score not in SCORES:
        raise MaskError(
            f"score is one of {', '.join(map(repr, SCORES))}, not {score!r}."
            f"{did_you_mean(score, SCORES)}"
        )


def _take(shape: Sequence[int], k: int, block_size: int, ids: NDArray[np.int64]) -> Support:
    """Return the first k entries of the blocks, in the order of ``ids``."""
    sizes = entries_of((block_size, block_size), ids, shape)
    ends = np.cumsum(sizes)
    last = int(np.searchsorted(ends, k))
    over = int(ends[last]) - k
    cut = int(sizes[last]) - over if over else None
    return support_of_blocks(shape, block_size, torch.from_numpy(ids[: last + 1]), cut)


def _spread(sizes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return the fewest evenly spaced places, of all, whose sizes sum up to k at least."""
    needed = max(1, -(-k // int(sizes.max())))
    while True:  # a few times at most: only blocks at an edge are smaller than the largest
        places = np.arange(needed, dtype=np.int64) * sizes.size // needed
        if int(sizes[places].sum()) >= k:
            return places
        needed += 1


def _block_sums(
    shape: Sequence[int], b: int, score: str, weight: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """Return float64 ``(blocks,)`` on the CPU: the sum of the score over each block, row-major."""
    rows, cols = matrix_shape(shape)
    operands = [
        check_scored(tensor, what, shape, f"score={score!r}")
        for what, tensor, by in (
            ("weight", weight, ("magnitude", "snip")),
            ("gradient", gradient, ("grad", "snip")),
        )
        if score in by
    ]
    across = -(-cols // b)
    sums = [torch.empty(0, dtype=torch.float64)]
    for band in _bands(operands, rows, cols, b):
        # Zeros to the full width and height of the blocks; a copy of this band alone.
        band = torch.nn.functional.pad(band, (0, -cols % b, 0, -len(band) % b))
        cells = band.view(-1, b, across, b).sum((1, 3), dtype=torch.float64)
        sums.append(cells.reshape(-1).cpu())
    result = torch.cat(sums)
    refuse_nan(result, lambda at: f"block ({at // across}, {at % across}) of {b} x {b} entries")
    return result


def _bands(operands: Sequence[Tensor], rows: int, cols: int, b: int) -> Iterable[Tensor]:
    """Yield the absolute product of the operands, as matrices of some rows of blocks each."""
    step = max(1, BLOCK // 4 // (b * cols)) * b  # a quarter: the sums are made in float64
    for low in range(0, rows, step):
        # [low : low + step] alone is made contiguous; of a vector, everything is the one row
        parts = [(t[low : low + step] if t.dim() > 1 else t).reshape(-1, cols) for t in operands]
        yield absolute_product(parts)
