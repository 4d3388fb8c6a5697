# SPDX-License-Identifier: Apache-2.0
"""Deltas as sparse matrices: singular values, rank, zeros of ``A^T B``, from entries alone.

`largest_singular_value` is Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization
(Golub and Van Loan, Matrix Computations, 4th ed., section 10.4.4): power iteration that forgets
nothing, so that it needs tens of products where power iteration needs thousands on the close
spectra of random masks. It gives AWOM, and the norm of one delta.

`zero_share` is AWOR: entry (i, j) of the product is other than zero if some row has both an entry
of A in column i and one of B in column j (that sums cancel exactly is not counted on). With B's
rows as strings of bits, column i of the answer is the OR of the rows in which A has an entry of
column i: one pass over ``n / 64`` words for each entry of A. The bits are ``m n / 8`` bytes, some
two or three times the indices themselves at 1-2 %, and are made in bounded blocks of rows. Where
that is too much, some columns of A are drawn and the others inferred.

`numerical_rank` is exact where all singular values are cheap. A rank can be no larger than the
number of rows, or of columns, that have an entry at all. Where that bound is large, ``Y = S A W``
with random S and W has the rank of A as long as it is below Y's own size; beyond that size all that
is known is a lower bound.

All in float64 and numpy: what comes out is limited by the method, not by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from shira.delta import SparseDelta
from shira.measure.figures import Estimate, Floats, check_finite, near_one
from shira.support import matrix_shape

Ints: TypeAlias = NDArray[np.int64]
Product: TypeAlias = Callable[[Floats], Floats]

TOLERANCE = 1e-4
"""Relative error of a largest singular value at which to stop."""
_STEPS = 300
_FEWEST = 16  # in which values part that are so close that one may be taken for the other
_NOTHING = 1e-13  # what vanishes beside a value

EFFORT = 2**27
"""Words of 64 bits to go through for the zeros of one weight: about a second."""
_MEMORY = 2**26  # bytes of answer, and of one block of B's rows
_LEAST = 64  # columns that are drawn at least
_RANK = 512  # the largest rank that is told exactly
_OVERSAMPLING = 32  # keeps the random factors well conditioned up to such a rank
_BLOCK = 4096  # rows of S at a time
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class Entries(NamedTuple):
    """Coordinates and values of a delta, in row-major order."""

    row: Ints
    col: Ints
    value: Floats

    def where(self, chosen: NDArray[np.bool_]) -> Entries:
        """Return some of them."""
        return Entries(self.row[chosen], self.col[chosen], self.value[chosen])


def entries_of(delta: SparseDelta) -> Entries:
    """Return a delta's entries, the weight seen as a matrix as it is stored."""
    _, cols = matrix_shape(delta.support.shape)
    flat = delta.support.indices.cpu().numpy().astype(np.int64)
    row = flat // max(cols, 1)
    return Entries(row, flat - row * cols, delta.values.detach().double().cpu().numpy())


class SparseMatrix:
    """A matrix as its entries, at least one, without the rows and columns that have none.

    Kept by row and by column, so that both a product and the transposed one are a gather and sums
    of runs. The values are divided by ``2^power``, so that squares neither overflow nor vanish.
    """

    def __init__(self, entries: Entries) -> None:
        rows, self.row = np.unique(entries.row, return_inverse=True)
        cols, self.col = np.unique(entries.col, return_inverse=True)
        self.shape = (rows.size, cols.size)
        self.value, self.power = near_one(entries.value)
        order = np.argsort(self.col, kind="stable")
        self._by_row = (_starts(self.row), self.col, self.value)
        self._by_col = (_starts(self.col[order]), self.row[order], self.value[order])

    def dot(self, vector: Floats) -> Floats:
        """Return ``A v``."""
        starts, col, value = self._by_row
        return np.add.reduceat(value * vector[col], starts)

    def transposed_dot(self, vector: Floats) -> Floats:
        """Return ``A^T v``."""
        starts, row, value = self._by_col
        return np.add.reduceat(value * vector[row], starts)


def _starts(labels: Ints) -> Ints:
    """Find where each run of equal labels begins, in labels that are sorted."""
    return np.flatnonzero(np.concatenate(([True], labels[1:] != labels[:-1])))


def generator(seed: int) -> np.random.Generator:
    """Make the generator of a seed, any integer."""
    return np.random.Generator(np.random.Philox(key=seed % 2**128))


def product_norm(
    a: Entries, b: Entries, *, tolerance: float = TOLERANCE, seed: int = 0
) -> Estimate:
    """Return the spectral norm of ``A^T B``, of the rows that both have: AWOM (paper sec. 3.3)."""
    a = a.where(np.isin(a.row, b.row))
    b = b.where(np.isin(b.row, a.row))
    if not a.row.size:
        return Estimate(0.0)
    left, right = SparseMatrix(a), SparseMatrix(b)  # with the same rows
    found = largest_singular_value(
        lambda v: left.transposed_dot(right.dot(v)),
        lambda u: right.transposed_dot(left.dot(u)),
        (left.shape[1], right.shape[1]),
        tolerance=tolerance,
        seed=seed,
    )
    return found.times_power(left.power + right.power)


def largest_singular_value(
    product: Product,
    transposed: Product,
    shape: tuple[int, int],
    *,
    tolerance: float = TOLERANCE,
    steps: int = _STEPS,
    seed: int = 0,
) -> Estimate:
    """Find the spectral norm of a matrix M of some shape that can only be multiplied with vectors.

    ``product`` is ``M v``, float64 ``(n,)`` to ``(m,)``, ``transposed`` is ``M^T u``. It stops at a
    relative error of ``tolerance``, after 16 steps at least, or after so many steps.

    Returns:
        The value, never too large but for rounding, and the residual: a singular value is certain
        to lie that near. That it is the largest is certain but for a start without a part in its
        direction, which has probability 0. Error 0 means that the iteration ended by itself.
    """
    if shape[0] < shape[1]:  # the vectors of the shorter side are spanned after as many steps
        product, transposed, shape = transposed, product, (shape[1], shape[0])
    steps = min(steps, shape[1])
    v = generator(seed).standard_normal(shape[1])
    v /= np.linalg.norm(v)
    right, left = np.empty((steps, shape[1])), np.empty((steps, shape[0]))
    diagonal, above = np.zeros(steps), np.zeros(steps)
    value = residual = 0.0
    for step in range(steps):
        right[step] = v
        u = _orthogonal(product(v), left[:step])
        diagonal[step] = _norm(u)
        if diagonal[step] > _NOTHING * value:
            u /= diagonal[step]
        else:
            diagonal[step], u = 0.0, np.zeros_like(u)
        left[step] = u
        v = _orthogonal(transposed(u), right[: step + 1])
        above[step] = _norm(v)
        small = np.diag(diagonal[: step + 1]) + np.diag(above[:step], 1)
        vectors, values, _ = np.linalg.svd(small)
        value, residual = float(values[0]), float(above[step] * abs(vectors[-1, 0]))
        if above[step] <= _NOTHING * value or step + 1 == shape[1]:
            return Estimate(value)
        if residual <= tolerance * value and step + 1 >= _FEWEST:
            break
        v /= above[step]
    return Estimate(value, residual)


def _orthogonal(vector: Floats, basis: Floats) -> Floats:
    """Return the part of a vector that is orthogonal to a basis; twice is enough."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _norm(vector: Floats) -> float:
    """Return the norm of a vector whose squares may be too small for float64."""
    largest = np.abs(vector).max(initial=0.0)
    return float(largest * np.linalg.norm(vector / largest)) if largest else 0.0


def zero_share(
    a: Entries, b: Entries, shape: tuple[int, int], *, effort: int = EFFORT, seed: int = 0
) -> Estimate:
    """Return the share of zeros among the ``n * n`` entries of ``A^T B``: AWOR (paper sec. 3.3).

    Beyond ``effort`` words to go through, columns are drawn (by ``seed``): then the error is the
    half-width of the 95 % confidence interval, else 0.
    """
    if not a.row.size or not b.row.size:
        return Estimate(1.0)
    _, n = shape
    words = -(-n // 64)
    cost = a.row.size * words
    columns = min(n, _MEMORY // max(8 * words, 1))
    if cost > effort:
        columns = min(columns, max(_LEAST, n * effort // cost))
    if columns >= n:
        return Estimate(1.0 - int(_filled(a, b, np.arange(n), shape).sum()) / (n * n))
    draw = generator(seed).choice(n, size=columns, replace=False)
    share = _filled(a, b, np.sort(draw), shape) / n  # (columns,)
    spread = share.std(ddof=1) / math.sqrt(columns) * math.sqrt(1 - columns / n)
    return Estimate(1.0 - float(share.mean()), 1.96 * float(spread))


def _filled(a: Entries, b: Entries, columns: Ints, shape: tuple[int, int]) -> Ints:
    """Count the entries other than zero in each of some rows of ``A^T B``."""
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
            dense = np.zeros((high - low, 64 * words), dtype=np.bool_)
            dense[b.row[in_b] - low, b.col[in_b]] = True
            bits = np.packbits(dense, axis=1).view(np.uint64)
            _or_rows(answer, place[a.col[in_a]], bits, a.row[in_a] - low)
    filled: Ints = _ONES[answer.view(np.uint8)].sum(axis=1, dtype=np.int64)
    return filled


def _or_rows(
    answer: NDArray[np.uint64], target: Ints, bits: NDArray[np.uint64], source: Ints
) -> None:
    """Do ``answer[target[i]] |= bits[source[i]]`` for all i."""
    order = np.argsort(target, kind="stable")
    target, source = target[order], source[order]
    first = _starts(target)
    count = np.diff(np.append(first, target.size))
    # the t-th entry of every column at once: in one go no target occurs twice
    for t in range(int(count.max())):
        at = first[count > t] + t
        answer[target[at]] |= bits[source[at]]


@dataclass(frozen=True)
class Rank:
    """The numerical rank of a delta.

    Attributes:
        rank: Singular values above ``tolerance`` times the largest.
        bound: The most that it can be: rows or columns that have a value other than zero,
            whichever are fewer.
        exact: Whether all singular values were computed. If not, the rank is that of a random
            sketch: singular values within a factor of about 50 of the tolerance may be miscounted.
        at_least: Whether the rank is only known to be no smaller than this.
        tolerance: Relative to the largest singular value.
        spectral_norm: The largest singular value.
        stable_rank: ``(Frobenius norm / spectral norm)^2``: how many directions matter.
    """

    rank: int
    bound: int
    exact: bool
    at_least: bool
    tolerance: float
    spectral_norm: Estimate
    stable_rank: float

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {**asdict(self), "spectral_norm": self.spectral_norm.as_json()}

    def __str__(self) -> str:
        sign = ">= " if self.at_least else "" if self.exact else "~ "
        return f"{sign}{self.rank} of at most {self.bound}"


def numerical_rank(
    delta: SparseDelta, *, tolerance: float | None = None, limit: int = _RANK, seed: int = 0
) -> Rank:
    """Count the singular values of a delta that are other than zero, the weight seen as a matrix.

    Args:
        delta: Of one weight.
        tolerance: Singular values count above this times the largest; default as
            ``torch.linalg.matrix_rank``: the larger side of the weight times the epsilon of the
            values' dtype (of float32, if that is finer).
        limit: Up to this rank the answer is a rank, beyond it "at least". The cost of the sketch is
            O(k limit + n limit^2), n the shorter side.
        seed: Of the sketch.

    Raises:
        AdapterError: If a value is not finite.

    Example:
        >>> diagonal = Support((3, 3), torch.tensor([0, 4, 8]))
        >>> print(numerical_rank(SparseDelta(diagonal, torch.tensor([1.0, 2.0, 3.0]))))
        3 of at most 3
    """
    check_finite(delta.values, "the delta")
    shape = matrix_shape(delta.support.shape)
    if tolerance is None:
        finest = min(torch.finfo(delta.values.dtype).eps, torch.finfo(torch.float32).eps)
        tolerance = max(*shape, 1) * finest
    entries = entries_of(delta)
    entries = entries.where(entries.value != 0)
    if not entries.row.size:
        return Rank(0, 0, True, False, tolerance, Estimate(0.0), 0.0)
    matrix = SparseMatrix(entries)
    bound = min(matrix.shape)
    if bound <= limit and matrix.shape[0] * matrix.shape[1] <= 4 * limit * limit:
        dense = np.zeros(matrix.shape)
        dense[matrix.row, matrix.col] = matrix.value
        values = np.linalg.svd(dense, compute_uv=False)
        norm, exact = Estimate(float(values[0])), True
    else:
        values = np.linalg.svd(_sketch(matrix, min(limit, bound), seed), compute_uv=False)
        norm, exact = largest_singular_value(matrix.dot, matrix.transposed_dot, matrix.shape), False
    rank = min(int((values > tolerance * values[0]).sum()), limit, bound)
    return Rank(
        rank=rank,
        bound=bound,
        exact=exact or rank == bound,
        at_least=not exact and rank == limit < bound,
        tolerance=tolerance,
        spectral_norm=norm.times_power(matrix.power),
        stable_rank=float(matrix.value @ matrix.value) / norm.value**2,
    )


def _sketch(matrix: SparseMatrix, size: int, seed: int) -> Floats:
    """Return ``S A W``, twice as many rows as columns, and these a few more than ``size``."""
    draw = generator(seed)
    row, col, value = matrix.row, matrix.col, matrix.value
    long, short = matrix.shape
    if long < short:
        order = np.argsort(col, kind="stable")
        row, col, value, long, short = col[order], row[order], value[order], short, long
    width = size + _OVERSAMPLING
    half = torch.zeros(short, 2 * width, dtype=torch.float64, device="cpu")  # (S A)^T
    for low in range(0, long, _BLOCK):
        high = min(low + _BLOCK, long)
        here = slice(*np.searchsorted(row, (low, high)))
        block = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack((col[here], row[here] - low))),
            torch.from_numpy(value[here]),
            (short, high - low),
            device="cpu",
            check_invariants=False,
        )
        half += torch.sparse.mm(
            block, torch.from_numpy(draw.standard_normal((high - low, 2 * width)))
        )
    sketch: Floats = half.numpy().T @ draw.standard_normal((short, width))
    return sketch
