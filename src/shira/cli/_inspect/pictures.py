# SPDX-License-Identifier: Apache-2.0
"""What `shira inspect --plot` and `shira report` draw: where the entries are, how large the values.

Both are counted entry by entry, O(k); no picture of the size of a weight is made.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from shira.delta import SparseDelta
from shira.support import Support, matrix_shape

CELLS = 96
"""Rows and columns of a heat map at most."""


def heat_map(support: Support, parts: tuple[int, int] = (CELLS, CELLS)) -> NDArray[np.float64]:
    """Share of the entries that are trained, in each of up to 96 x 96 parts of the weight.

    Args:
        support: Of a weight; more than two dimensions count as a matrix of ``shape[0]`` rows.
        parts: Rows and columns of parts at most.

    Returns:
        float64, rows by columns of parts; each between 0 and 1. The parts are as even as they can
        be: part i of p holds the rows from ``ceil(i * rows / p)`` on.
    """
    rows, cols = matrix_shape(support.shape)
    down, across = min(rows, parts[0]), min(cols, parts[1])
    if not down or not across:
        return np.zeros((0, 0))
    row, col = np.divmod(support.indices.cpu().numpy().astype(np.int64), cols)
    part = row * down // rows * across + col * across // cols
    counts = np.bincount(part, minlength=down * across).reshape(down, across)
    return counts / np.outer(_sizes(rows, down), _sizes(cols, across))


def histogram(
    deltas: Iterable[SparseDelta], reach: float, bins: int = 101
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many values there are in each of some equal parts of ``[-reach, reach]``.

    Args:
        deltas: Of finite values, none beyond ``reach``.
        reach: The largest absolute value; 0 counts as 1.
        bins: How many parts; odd, so that zero is inside of one.

    Returns:
        int64 ``(bins,)`` counts and float64 ``(bins + 1,)`` edges.
    """
    edges = np.linspace(-1.0, 1.0, bins + 1) * (reach or 1.0)  # 2 * reach may be too large
    counts = np.zeros(bins, np.int64)
    for delta in deltas:
        values = delta.values.detach().to("cpu", torch.float64).numpy()
        counts += np.histogram(values, edges)[0]
    return counts, edges


def _sizes(size: int, parts: int) -> NDArray[np.int64]:
    """Rows (or columns) in each part: i belongs to part ``i * parts // size``."""
    starts = -(-np.arange(parts + 1, dtype=np.int64) * size // parts)
    return np.diff(starts)
