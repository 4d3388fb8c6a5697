# SPDX-License-Identifier: Apache-2.0
"""The numerical rank of a delta, exact where singular values are cheap, else from a sketch.

A rank can be no larger than the number of rows, or of columns, that have an entry at all. Where
that bound is large, ``Y = S A W`` with random S and W has the rank of A as long as it is below Y's
own size; beyond that size all that is known is a lower bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from shira.delta import SparseDelta
from shira.measure.figures import Estimate, Floats, check_finite
from shira.measure.matrix import SparseMatrix, entries_of, generator, largest_singular_value
from shira.support import matrix_shape

LIMIT = 512
_OVERSAMPLING = 32  # keeps the random factors well conditioned up to a rank of LIMIT
_BLOCK = 4096  # rows of S at a time


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
    delta: SparseDelta, *, tolerance: float | None = None, limit: int = LIMIT, seed: int = 0
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
