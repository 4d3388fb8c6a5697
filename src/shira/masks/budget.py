# SPDX-License-Identifier: Apache-2.0
"""The number of entries of a weight to train or keep: k, from a LoRA rank or a density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shira.errors import ConfigError, MaskError
from shira.masks.topk import top_k_of_all
from shira.support import matrix_shape


def budget(m: int, n: int, r: int, *, name: str = "") -> int:
    """Return ``r * (m + n)``: the parameters a LoRA of rank r would have on an m x n weight.

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
    """Return ``density * numel``, rounded to the nearest integer; at least 1 unless either is zero.

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
    """Return the entries of a weight of this shape, after making sure that it has k of them."""
    numel = math.prod(shape)
    if k < 0:
        raise MaskError(f"a mask has a number of entries, so k is at least 0, not {k}")
    if k > numel:
        raise MaskError(
            f"a mask of {k} entries does not fit a weight of shape {tuple(shape)}, "
            f"which has {numel}"
        )
    return numel


@dataclass(frozen=True)
class Budget:
    """The number of entries a conversion keeps: by density, as LoRA counts, or left open.

    Attributes:
        density: Share of each tensor's entries.
        r: ``r * (m + n)`` entries of an m x n tensor; one of a single dimension is kept whole.
        everywhere: Spend the sum of the tensors' budgets on the largest entries of all tensors,
            not on the largest of each.

    Raises:
        ConfigError: If both ``density`` and ``r`` are given, one is out of range, or
            ``everywhere`` stands alone.
    """

    density: float | None = None
    r: int | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        if self.density is not None and self.r is not None:
            raise ConfigError("a budget is either a density or an r, as LoRA's")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density is a share above 0 and up to 1, not {self.density}")
        if self.r is not None and self.r < 1:
            raise ConfigError(f"r is at least 1, not {self.r}")
        if self.everywhere and not self.given:
            raise ConfigError("a budget everywhere needs a density or an r")

    @property
    def given(self) -> bool:
        """False if it is left open."""
        return self.density is not None or self.r is not None

    def entries(self, shape: tuple[int, ...]) -> int:
        """Return how many entries of a tensor of this shape, at most all of them."""
        numel = math.prod(shape)
        if self.r is None:
            return budget_from_density(numel, self.density or 0.0)
        if len(shape) < 2:
            return numel
        return min(numel, self.r * sum(matrix_shape(shape)))

    def largest(
        self,
        scores: Mapping[str, Iterable[Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        otherwise: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        """Return flat indices, increasing, of the entries of highest score of each tensor.

        Scores come in flat pieces as `top_k` takes them. A budget that is left open is
        ``otherwise`` so many entries of each tensor.
        """
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        if self.given or otherwise is None:
            otherwise = {name: self.entries(shape) for name, shape in shapes.items()}
        if self.everywhere:
            return top_k_of_all(scores, sizes, sum(otherwise.values()))
        found: dict[str, Tensor] = {}
        for name, blocks in scores.items():
            found |= top_k_of_all({name: blocks}, sizes, otherwise[name])
        return found


def _of(name: str) -> str:
    return f"{name}: " if name else ""
