# SPDX-License-Identifier: Apache-2.0
"""How many entries a conversion keeps, and of which tensor: `Budget`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shira.errors import ConfigError
from shira.masks.budget import budget_from_density
from shira.support import matrix_shape


@dataclass(frozen=True)
class Budget:
    """A number of entries, by density or as LoRA counts.

    Attributes:
        density: Share of each tensor's entries.
        r: ``r * (m + n)`` entries of an m x n tensor; one of a single dimension is kept whole.
        everywhere: Spend the sum of the tensors' budgets on the largest entries of all tensors,
            not on the largest of each.

    Raises:
        ConfigError: If both or neither of ``density`` and ``r`` are given, or one is out of range.
    """

    density: float | None = None
    r: int | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        if (self.density is None) == (self.r is None):
            raise ConfigError("a budget is either a density or an r, as LoRA's")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density is a share above 0 and up to 1, not {self.density}")
        if self.r is not None and self.r < 1:
            raise ConfigError(f"r is at least 1, not {self.r}")

    def entries(self, shape: tuple[int, ...]) -> int:
        """Entries of a tensor of this shape: at most all of them."""
        numel = math.prod(shape)
        if self.r is None:
            return budget_from_density(numel, self.density or 0.0)
        if len(shape) < 2:
            return numel
        return min(numel, self.r * sum(matrix_shape(shape)))

    def total(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Entries of all tensors together."""
        return sum(self.entries(shape) for shape in shapes.values())


def budget_or_none(density: float | None, r: int | None, everywhere: bool) -> Budget | None:
    """A budget of what a caller gave; None if that is nothing.

    Raises:
        ConfigError: As `Budget`, and if ``everywhere`` stands alone.
    """
    if density is None and r is None:
        if everywhere:
            raise ConfigError("a budget everywhere needs a density or an r")
        return None
    return Budget(density, r, everywhere)
