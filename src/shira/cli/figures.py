# SPDX-License-Identifier: Apache-2.0
"""Figures of an adapter's values, made weight by weight and added up.

Sums are kept instead of the values, so that an adapter of any size is described in the memory of
its largest weight. They are sums of the values divided by the largest, for the squares of values
that float64 holds but not theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.base import replacement


@dataclass(frozen=True)
class Figures:
    """Count, extremes and sums of some values; adding two gives those of both together."""

    count: int = 0
    zeros: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    total_absolute: float = 0.0
    total_squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Figures:
        """Return the figures of a 1-D tensor of finite values, summed in float64."""
        if not values.numel():
            return cls()
        values = values.detach().double()
        minimum, maximum = float(values.min()), float(values.max())
        shares = values / (max(abs(minimum), abs(maximum)) or 1.0)
        sums = (float(x.sum()) for x in (shares, shares.abs(), shares.square()))
        return cls(values.numel(), int((values == 0).sum()), minimum, maximum, *sums)

    def __add__(self, other: Figures) -> Figures:
        reach = max(self.reach, other.reach) or 1.0
        a, b = self.reach / reach, other.reach / reach
        return Figures(
            count=self.count + other.count,
            zeros=self.zeros + other.zeros,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            total=a * self.total + b * other.total,
            total_absolute=a * self.total_absolute + b * other.total_absolute,
            total_squares=a * a * self.total_squares + b * b * other.total_squares,
        )

    @property
    def reach(self) -> float:
        """The largest absolute value; 0 if there is none."""
        return max(abs(self.minimum), abs(self.maximum)) if self.count else 0.0

    @property
    def mean_absolute(self) -> float:
        """The mean absolute value; 0 if there is none."""
        return self.reach * min(self.total_absolute / max(self.count, 1), 1.0)

    def summary(self) -> dict[str, float | int | None]:
        """Return min, max, mean absolute value, (population) standard deviation, zeros.

        ``None`` stands where there is no value to have any.
        """
        if not self.count:
            return {"min": None, "max": None, "mean_abs": None, "std": None, "zeros": 0}
        variance = self.total_squares / self.count - (self.total / self.count) ** 2
        return {
            "min": self.minimum,
            "max": self.maximum,
            "mean_abs": self.mean_absolute,
            "std": self.reach * math.sqrt(min(max(variance, 0.0), 1.0)),
            "zeros": self.zeros,
        }


def vanishing(base: Tensor, delta: Tensor) -> int:
    """Count the deltas other than zero that change nothing in a bfloat16 copy of the base.

    The base ``(k,)`` is rounded to bfloat16 first, as whoever serves it in bfloat16 does; then a
    delta vanishes if ``round(base + delta)`` is that same number.
    """
    rounded = base.to(torch.bfloat16)
    unchanged = replacement(rounded, delta) == rounded
    return int((unchanged & (delta != 0)).sum())
