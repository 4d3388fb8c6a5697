# SPDX-License-Identifier: Apache-2.0
"""The table of ways to fuse: `METHODS`. A row says how each delta is thinned and how they combine.

============== =============== ================= ================================================
method         each delta      together          source
============== =============== ================= ================================================
sum            as it is        weighted sum      task arithmetic, arXiv 2212.04089; paper sec. 3.3
mean           as it is        weighted mean     the same
ties           trimmed         elected mean      TIES, arXiv 2306.01708
dare           dropped         weighted sum      DARE, arXiv 2311.03099
dare_ties      dropped         elected mean      both
della          MagPrune        elected mean      DELLA, arXiv 2406.11617
magnitude      as it is        sum, then pruned  the largest k of the sum
magnitude_prune trimmed        weighted sum      PEFT's combination type of that name
============== =============== ================= ================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from shira.delta import SparseDelta
from shira.fusing.combine import elected_mean, weighted_sum
from shira.fusing.sparsify import drop, mag_prune, trim


@dataclass(frozen=True)
class Settings:
    """What a method may be told; see `shira.fuse`."""

    density: float = 1.0
    epsilon: float = 0.0
    majority_sign_method: str = "total"
    seed: int = 0
    total_weight: float = 1.0
    """Of all adapters, those without the parameter included."""


Draw = Callable[[], Tensor]
"""Uniform numbers in [0, 1), float64 ``(k,)``, for the delta at hand."""


class Method(NamedTuple):
    """One way to fuse.

    Attributes:
        sparsify: What is done to each delta first.
        combine: Makes one delta of all of a weight.
        options: Options of `shira.fuse` that it takes.
        density: Default of that option; None if it has none.
        random: Whether it draws; it then takes a seed.
        budget: Whether the result is pruned to ``k`` entries.
        associative: Whether ``fuse([fuse([a, b]), c])`` is ``fuse([a, b, c])``: the positions
            exactly, the values to rounding. All methods are commutative, bit for bit.
    """

    sparsify: Callable[[SparseDelta, Settings, Draw], SparseDelta] | None
    combine: Callable[[Sequence[SparseDelta], Sequence[float], Settings], SparseDelta]
    options: tuple[str, ...]
    density: float | None
    random: bool
    budget: bool
    associative: bool


def _trim(delta: SparseDelta, settings: Settings, draw: Draw) -> SparseDelta:
    return trim(delta, settings.density)


def _drop(delta: SparseDelta, settings: Settings, draw: Draw) -> SparseDelta:
    return drop(delta, settings.density, draw())


def _mag_prune(delta: SparseDelta, settings: Settings, draw: Draw) -> SparseDelta:
    return mag_prune(delta, settings.density, settings.epsilon, draw())


def _sum(
    deltas: Sequence[SparseDelta], weights: Sequence[float], settings: Settings
) -> SparseDelta:
    return weighted_sum(deltas, weights)


def _mean(
    deltas: Sequence[SparseDelta], weights: Sequence[float], settings: Settings
) -> SparseDelta:
    total = weighted_sum(deltas, weights)
    return SparseDelta(total.support, total.values / settings.total_weight)


def _elect(
    deltas: Sequence[SparseDelta], weights: Sequence[float], settings: Settings
) -> SparseDelta:
    return elected_mean(deltas, weights, settings.majority_sign_method)


_VOTE = "majority_sign_method"

METHODS: Mapping[str, Method] = {
    "sum": Method(None, _sum, (), None, False, False, True),
    "mean": Method(None, _mean, (), None, False, False, False),
    "ties": Method(_trim, _elect, ("density", _VOTE), 1.0, False, False, False),
    "dare": Method(_drop, _sum, ("density", "seed"), 0.5, True, False, False),
    "dare_ties": Method(_drop, _elect, ("density", "seed", _VOTE), 0.5, True, False, False),
    "della": Method(
        _mag_prune, _elect, ("density", "epsilon", "seed", _VOTE), 0.5, True, False, False
    ),
    "magnitude": Method(None, _sum, ("density", "k"), None, False, True, False),
    "magnitude_prune": Method(_trim, _sum, ("density",), 0.5, False, False, False),
}
EPSILON = 0.1
"""Default width of DELLA's range of probabilities."""
