# SPDX-License-Identifier: Apache-2.0
"""The `struct` mask: every f-th row (or column) and the diagonal.

::

    axis="row", 19 entries       axis="column", 20 entries
    1 1 1 1 1 1 1 1 1            1 . . 1 . . 1 . .
    . 1 . . . . . . .            1 1 . 1 . . 1 . .
    . . 1 . . . . . .            1 . 1 1 . . 1 . .
    1 1 1 1 1 1 . . .  <- cut    1 . . 1 . . 1 . .
    . . . . 1 . . . .            1 . . 1 1 . . . .
    . . . . . 1 . . .            1 . . 1 . 1 . . .  <- cut

The lines alone would be an adapter of low rank; the diagonal makes its rank high.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shira.errors import MaskError, did_you_mean
from shira.masks.budget import check_fits
from shira.support import Support, matrix_shape

AXES = ("row", "column")


def struct_support(
    shape: Sequence[int], k: int, *, axis: Literal["row", "column"] = "row", offset: int = 0
) -> Support:
    """Choose the diagonal and evenly spaced lines, k entries in all (paper B.1, SHiRA-Struct).

    The diagonal comes first (its first k entries, should the budget be shorter). What is left is
    spent on as few lines as hold it, spread evenly: every f-th, f the number of rows (or columns)
    over that of lines, rounded line by line. An entry of the diagonal that a line crosses counts
    once, and the last line is cut where the budget ends. Weights of more than two dimensions count
    as matrices of ``shape[0]`` rows. O(k).

    Args:
        shape: Shape of the weight as stored.
        k: The number of entries.
        axis: Whether the lines are rows or columns of the weight as stored.
        offset: The first line; counts round the end, so that it may exceed the number of lines.

    Returns:
        A support of exactly k entries, on the CPU.

    Raises:
        MaskError: If k entries do not fit the weight, or the axis is unknown.
    """
    check_fits(shape, k)
    if axis not in AXES:
        raise MaskError(f"axis is 'row' or 'column', not {axis!r}.{did_you_mean(axis, AXES)}")
    rows, cols = matrix_shape(shape)
    # Steps in the flat index: from line to line, and along a line.
    count, length = (rows, cols) if axis == "row" else (cols, rows)
    across, along = (cols, 1) if axis == "row" else (1, cols)

    diagonal = np.arange(min(rows, cols, k), dtype=np.int64) * (cols + 1)
    rest = k - diagonal.size
    if rest:
        lines = _lines(count, length, rest, offset)
        entries = (lines[:, None] * across + np.arange(length) * along)[
            lines[:, None] != np.arange(length)  # off the diagonal
        ]
        diagonal = np.concatenate((diagonal, entries[:rest]))
    diagonal.sort()
    return Support._trusted(shape, torch.from_numpy(diagonal))


def _lines(count: int, length: int, rest: int, offset: int) -> NDArray[np.int64]:
    """Return the fewest even lines, of ``count``, that hold ``rest`` entries off the diagonal."""
    needed = -(-rest // length)
    while True:  # twice at most: the lines together cross the diagonal min(count, length) times
        lines = (offset + np.arange(needed, dtype=np.int64) * count // needed) % count
        if needed * length - int((lines < length).sum()) >= rest:
            return lines
        needed += 1
