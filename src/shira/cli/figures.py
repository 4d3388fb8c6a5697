# SPDX-License-Identifier: Apache-2.0
"""Figures of an adapter's values, made weight by weight and added up.

Sums are kept instead of the values, so that an adapter of any size is described in the memory of
its largest weight. They are `Wide`, for the squares of values that float64 holds but not theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.base import replacement
from shira.measure.wide import ZERO, Wide, dot, near_one
from shira.measure.wide import total as added


@dataclass(frozen=True)
class Figures:
    """Count, extremes and sums of some values; adding two gives those of both together."""

    count: int = 0
    zeros: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: Wide = ZERO
    total_absolute: Wide = ZERO
    total_squares: Wide = ZERO

    @classmethod
    def of(cls, values: Tensor) -> Figures:
        """The figures of a 1-D tensor of finite values, summed in float64."""
        if not values.numel():
            return cls()
        wide = values.detach().double()
        scaled, exponent = near_one(wide)
        return cls(
            count=wide.numel(),
            zeros=int((wide == 0).sum()),
            minimum=float(wide.min()),
            maximum=float(wide.max()),
            total=Wide.of(float(scaled.sum()), exponent),
            total_absolute=Wide.of(float(scaled.abs().sum()), exponent),
            total_squares=dot(wide, wide),
        )

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            count=self.count + other.count,
            zeros=self.zeros + other.zeros,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            total=added((self.total, other.total)),
            total_absolute=added((self.total_absolute, other.total_absolute)),
            total_squares=added((self.total_squares, other.total_squares)),
        )

    @property
    def reach(self) -> float:
        """The largest absolute value; 0 if there is none."""
        return max(abs(self.minimum), abs(self.maximum)) if self.count else 0.0

    def summary(self) -> dict[str, float | int | None]:
        """What is printed: min, max, mean absolute value, (population) standard deviation, zeros.

        ``None`` stands where there is no value to have any.
        """
        if not self.count:
            return {"min": None, "max": None, "mean_abs": None, "std": None, "zeros": 0}
        count = Wide.of(float(self.count))
        mean = self.total / count
        std = (self.total_squares / count - mean * mean).root()
        return {
            "min": self.minimum,
            "max": self.maximum,
            "mean_abs": min(float(self.total_absolute / count), self.reach),
            "std": min(float(std), self.reach),
            "zeros": self.zeros,
        }


def vanishing(base: Tensor, delta: Tensor) -> int:
    """How many deltas other than zero change nothing in a bfloat16 copy of the base.

    The base is rounded to bfloat16 first, as whoever serves it in bfloat16 does; then a delta
    vanishes if ``round(base + delta)`` is that same number.

    Args:
        base: ``(k,)`` values of the base weight at the adapter's positions.
        delta: ``(k,)`` the adapter's values.
    """
    held = base.to(torch.bfloat16)
    unchanged = replacement(held, delta) == held
    return int((unchanged & (delta != 0)).sum())
