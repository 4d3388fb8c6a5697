# SPDX-License-Identifier: Apache-2.0
"""How many entries of a weight to train: k, from a rank as LoRA counts or from a density."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shira.errors import MaskError


def budget(m: int, n: int, r: int, *, name: str = "") -> int:
    """``r * (m + n)``: the parameters a LoRA of rank r would have on an m x n weight.

    Args:
        m: Rows of the weight, seen as a matrix.
        n: Its columns.
        r: The rank; it sets the budget alone, the adapter's own rank is not limited.
        name: The parameter, for the error message.

    Raises:
        MaskError: If r is below 1, or the budget exceeds the weight's ``m * n`` entries.
    """
    if r < 1:
        raise MaskError(f"{_of(name)}r is at least 1, not {r}")
    k = r * (m + n)
    if k <= m * n:
        return k
    most = m * n // (m + n) if m + n else 0
    advice = f"the largest r that fits is {most}" if most else "no r fits; give a density instead"
    raise MaskError(
        f"{_of(name)}r={r} asks for r * (m + n) = {k} entries of a {m} x {n} weight, which has "
        f"{m * n}; {advice}"
    )


def budget_from_density(numel: int, density: float, *, name: str = "") -> int:
    """``density * numel``, rounded to the nearest integer; at least 1 unless either is zero.

    Args:
        numel: Entries of the weight.
        density: Share of them to train, from 0 to 1.
        name: The parameter, for the error message.

    Raises:
        MaskError: If the density is not between 0 and 1.
    """
    if not 0 <= density <= 1:  # false for NaN as well
        raise MaskError(f"{_of(name)}density is a share, from 0 to 1, not {density}")
    if not numel or not density:
        return 0
    return max(1, round(numel * density))


def check_fits(shape: Sequence[int], k: int) -> int:
    """The entries of a weight of this shape, after making sure that k of them can be chosen.

    Raises:
        MaskError: If k is negative or larger than the weight.
    """
    numel = math.prod(shape)
    if k < 0:
        raise MaskError(f"a mask has a number of entries, so k is at least 0, not {k}")
    if k > numel:
        raise MaskError(
            f"a mask of {k} entries does not fit a weight of shape {tuple(shape)}, "
            f"which has {numel}"
        )
    return numel


def _of(name: str) -> str:
    return f"{name}: " if name else ""
