# SPDX-License-Identifier: Apache-2.0
"""`SparseMatrix`: a delta as a matrix, for products with vectors at the price of its entries.

Kept by row and by column, so that both a product and the transposed one are a gather and sums of
runs. Rows and columns without an entry are left out. float64, numpy: exact enough that what comes
out is limited by the method, not by rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shira.delta import SparseDelta
from shira.measure.wide import times_power
from shira.support import matrix_shape

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Entries(NamedTuple):
    """Coordinates and values of a delta, in row-major order."""

    row: Ints
    col: Ints
    value: Floats

    def where(self, chosen: NDArray[np.bool_]) -> Entries:
        """Some of them."""
        return Entries(self.row[chosen], self.col[chosen], self.value[chosen])

    def near_one(self) -> tuple[Entries, int]:
        """Values over a power of two, so that squares neither overflow nor vanish; the power."""
        exponent = math.frexp(float(np.abs(self.value).max(initial=0.0)))[1]
        return self._replace(value=times_power(self.value, -exponent)), exponent


def entries_of(delta: SparseDelta) -> Entries:
    """A delta's entries, the weight seen as a matrix as it is stored."""
    _, cols = matrix_shape(delta.support.shape)
    flat = delta.support.indices.cpu().numpy().astype(np.int64)
    row = flat // max(cols, 1)
    value = delta.values.detach().double().cpu().numpy()
    return Entries(row, flat - row * cols, value)


class SparseMatrix:
    """A sparse matrix of which every row and column has an entry.

    Args:
        entries: At least one, sorted by row.
    """

    def __init__(self, entries: Entries) -> None:
        self.rows, row = np.unique(entries.row, return_inverse=True)
        self.cols, col = np.unique(entries.col, return_inverse=True)
        self.shape = (self.rows.size, self.cols.size)
        self.square = float(entries.value @ entries.value)
        self.row, self.col, self.value = row, col, entries.value
        self._by_row = (_starts(row), col, entries.value)
        order = np.argsort(col, kind="stable")
        self._by_col = (_starts(col[order]), row[order], entries.value[order])

    def dot(self, vector: Floats) -> Floats:
        """``A v``."""
        starts, col, value = self._by_row
        return np.add.reduceat(value * vector[col], starts)

    def transposed_dot(self, vector: Floats) -> Floats:
        """``A^T v``."""
        starts, row, value = self._by_col
        return np.add.reduceat(value * vector[row], starts)


def _starts(labels: Ints) -> Ints:
    """Where each run of equal labels begins, in labels that are sorted and lack none."""
    return np.flatnonzero(np.concatenate(([True], labels[1:] != labels[:-1])))
