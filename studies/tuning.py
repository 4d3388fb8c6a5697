# SPDX-License-Identifier: Apache-2.0
"""The rule by which every study chooses a rate: a grid, and beyond it where the best is at an edge.

Rates are exponents, whole numbers: each study says what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


def explore(
    grid: Iterable[int], beyond: int, loss: Callable[[int], float | None]
) -> tuple[list[int], int | None]:
    """Return the exponents to try, and the best of them: lowest loss, the lower one of equals.

    Args:
        grid: those to begin with, without gaps.
        beyond: where the best is the first or last of those tried, the next one is tried too, up
            to so many on either side.
        loss: of an exponent; None while it is not known.

    Returns:
        Exponents in rising order, and the best; None while a loss is missing.
    """
    low, high = min(grid), max(grid)
    first, last = low, high
    while True:
        tried = list(range(first, last + 1))
        losses = {exponent: loss(exponent) for exponent in tried}
        known = {e: value for e, value in losses.items() if value is not None}
        if len(known) < len(tried):
            return tried, None
        best = min(known, key=lambda e: (known[e], e))
        if best == first and first > low - beyond:
            first -= 1
        elif best == last and last < high + beyond:
            last += 1
        else:
            return tried, best
