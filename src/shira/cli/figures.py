# SPDX-License-Identifier: Apache-2.0
"""Figures of an adapter's values, made weight by weight and brought together.

Figures are kept instead of the values, so that an adapter of any size is described in the memory of
its largest weight. No square of a value is made, which float64 may not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.base import replacement
from shira.measure.figures import ldexp, near_one


@dataclass(frozen=True)
class Figures:
    """Count, extremes, means and (population) standard deviation of some values.

    Adding two gives those of both together.
    """

    count: int = 0
    zeros: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    mean: float = 0.0
    mean_abs: float = 0.0
    std: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Figures:
        """Return the figures of a 1-D tensor of finite values, made in float64."""
        if not values.numel():
            return cls()
        wide = values.detach().double()
        scaled, exponent = near_one(wide)
        reach = float(wide.abs().max())
        return cls(
            count=wide.numel(),
            zeros=int((wide == 0).sum()),
            minimum=float(wide.min()),
            maximum=float(wide.max()),
            mean=_within(reach, ldexp(float(scaled.mean()), exponent)),
            mean_abs=_within(reach, ldexp(float(scaled.abs().mean()), exponent)),
            std=_within(reach, ldexp(float(scaled.std(correction=0)), exponent)),
        )

    def __add__(self, other: Figures) -> Figures:
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        one, two = self.count / count, other.count / count
        between = math.sqrt(one * two)  # of the means, in the variance of both together
        reach = max(self.reach, other.reach)
        std = math.hypot(
            math.sqrt(one) * self.std,
            math.sqrt(two) * other.std,
            between * self.mean - between * other.mean,
        )
        return Figures(
            count=count,
            zeros=self.zeros + other.zeros,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            mean=_within(reach, one * self.mean + two * other.mean),
            mean_abs=_within(reach, one * self.mean_abs + two * other.mean_abs),
            std=_within(reach, std),
        )

    @property
    def reach(self) -> float:
        """The largest absolute value; 0 if there is none."""
        return max(abs(self.minimum), abs(self.maximum)) if self.count else 0.0

    def summary(self) -> dict[str, float | int | None]:
        """Return what is printed; ``None`` stands where there is no value to have any figure."""
        if not self.count:
            return {"min": None, "max": None, "mean_abs": None, "std": None, "zeros": 0}
        figures = (self.minimum, self.maximum, self.mean_abs, self.std, self.zeros)
        return dict(zip(("min", "max", "mean_abs", "std", "zeros"), figures, strict=True))


def _within(reach: float, figure: float) -> float:
    """Bound a figure that rounding may put beyond the largest value, and so beyond float64."""
    return max(-reach, min(figure, reach))


def vanishing(base: Tensor, delta: Tensor) -> int:
    """Count the deltas other than zero that change nothing in a bfloat16 copy of the base.

    The base ``(k,)`` is rounded to bfloat16 first, as whoever serves it in bfloat16 does; then a
    delta vanishes if ``round(base + delta)`` is that same number.
    """
    rounded = base.to(torch.bfloat16)
    unchanged = replacement(rounded, delta) == rounded
    return int((unchanged & (delta != 0)).sum())
