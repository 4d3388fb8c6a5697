# SPDX-License-Identifier: Apache-2.0
"""AWOR: the share of zeros in ``A^T B``, from the positions alone.

Entry (i, j) of the product is other than zero if some row has both an entry of A in column i and
one of B in column j (that sums cancel exactly is not counted on). With B's rows as strings of bits,
column i of the answer is the OR of the rows in which A has an entry of column i: one pass over
``n / 64`` words for each entry of A. The bits are ``m n / 8`` bytes, some two or three times the
indices themselves at 1-2 %, and are made in bounded blocks of rows.

Where that is too much, some columns of A are drawn and the others inferred.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shira.measure.figures import Estimate
from shira.measure.sparse import Entries, Ints
from shira.measure.spectral import generator

EFFORT = 2**27
"""Words of 64 bits to go through for one weight: about a second."""
_MEMORY = 2**26  # bytes of answer, and of one block of B's rows
_LEAST = 64  # columns that are drawn at least
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def zero_share(
    a: Entries, b: Entries, shape: tuple[int, int], *, effort: int = EFFORT, seed: int = 0
) -> Estimate:
    """The share of zeros among the ``n * n`` entries of ``A^T B``.

    Args:
        a: Entries of the first, sorted by row.
        b: Of the second.
        shape: Rows and columns (m, n) of both.
        effort: Words that may be gone through; beyond that columns are drawn.
        seed: Of the draw.

    Returns:
        Exact, with error 0; or an estimate with the half-width of its 95 % confidence interval.
    """
    _, n = shape
    words = -(-n // 64)
    cost = a.row.size * words
    columns = min(n, _MEMORY // max(8 * words, 1))
    if cost > effort:
        columns = min(columns, max(_LEAST, n * effort // cost))
    if columns >= n:
        filled = int(_filled(a, b, np.arange(n), shape).sum())
        return Estimate(1.0 - filled / (n * n) if n else 1.0)
    draw = generator(seed).choice(n, size=columns, replace=False)
    share = _filled(a, b, np.sort(draw), shape) / n  # (columns,)
    spread = share.std(ddof=1) / math.sqrt(columns) * math.sqrt(1 - columns / n)
    return Estimate(1.0 - float(share.mean()), 1.96 * float(spread))


def _filled(a: Entries, b: Entries, columns: Ints, shape: tuple[int, int]) -> Ints:
    """How many entries of each of some rows of ``A^T B`` are other than zero."""
    m, n = shape
    words = -(-n // 64)
    place = np.full(n, -1)
    place[columns] = np.arange(columns.size)
    answer = np.zeros((columns.size, words), dtype=np.uint64)
    a = a.where(place[a.col] >= 0)
    block = max(1, _MEMORY // max(64 * words, 1))  # rows of B whose bytes, one an entry, fit
    for low in range(0, m, block):
        high = min(low + block, m)
        in_a = slice(*np.searchsorted(a.row, (low, high)))
        in_b = slice(*np.searchsorted(b.row, (low, high)))
        if a.row[in_a].size and b.row[in_b].size:
            bits = _bits(b.row[in_b] - low, b.col[in_b], high - low, words)
            _or_rows(answer, place[a.col[in_a]], bits, a.row[in_a] - low)
    filled: Ints = _ONES[answer.view(np.uint8)].sum(axis=1, dtype=np.int64)
    return filled


def _bits(row: Ints, col: Ints, rows: int, words: int) -> NDArray[np.uint64]:
    dense = np.zeros((rows, 64 * words), dtype=np.bool_)
    dense[row, col] = True
    return np.packbits(dense, axis=1).view(np.uint64)


def _or_rows(
    answer: NDArray[np.uint64], target: Ints, bits: NDArray[np.uint64], source: Ints
) -> None:
    """``answer[target[i]] |= bits[source[i]]`` for all i."""
    order = np.argsort(target, kind="stable")
    target, source = target[order], source[order]
    first = np.flatnonzero(np.concatenate(([True], target[1:] != target[:-1])))
    count = np.diff(np.append(first, target.size))
    # the t-th entry of every column at once: in one go no target occurs twice
    for t in range(int(count.max())):
        at = first[count > t] + t
        answer[target[at]] |= bits[source[at]]
