# SPDX-License-Identifier: Apache-2.0
"""The rule by which every study chooses a rate: a grid, and beyond it where the best is at an edge.

Rates are exponents, a whole step apart: each study says what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

E = TypeVar("E", int, float)


def explore(
    grid: Iterable[E], beyond: int, loss: Callable[[E], float | None]
) -> tuple[list[E], E | None]:
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
        tried = [first + step for step in range(round(last - first) + 1)]
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
