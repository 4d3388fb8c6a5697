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

A further method is a function in a file of its own and a row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from shira.delta import SparseDelta
from shira.errors import ConfigError, did_you_mean
from shira.fusing.steps import drop, elected_mean, mag_prune, trim, weighted_mean, weighted_sum

EPSILON = 0.1
"""Default width of DELLA's range of probabilities."""


@dataclass(frozen=True)
class Method:
    """One way to fuse.

    The functions name the options of `shira.fuse` that they take as parameters, behind the delta or
    the deltas and weights; ``draw`` (uniform numbers for the delta's entries) and ``total_weight``
    (of all adapters) are given to them too.

    Attributes:
        combine: Makes one delta of all of a weight.
        sparsify: Thins out each delta first.
        density: Default of that option.
        budget: Whether the result is pruned to ``k`` entries.
        associative: Whether ``fuse([fuse([a, b]), c])`` is ``fuse([a, b, c])``: the positions
            exactly, the values to rounding. All methods are commutative, bit for bit.
    """

    combine: Callable[..., SparseDelta]
    sparsify: Callable[..., SparseDelta] | None = None
    density: float | None = None
    budget: bool = False
    associative: bool = False

    @cached_property
    def random(self) -> bool:
        """True if it draws; it then takes a seed."""
        return self.sparsify is not None and "draw" in parameters_of(self.sparsify)

    @cached_property
    def options(self) -> tuple[str, ...]:
        """Options of `shira.fuse` that it takes."""
        named = [name for f in (self.sparsify, self.combine) if f for name in parameters_of(f)]
        own = ["seed" if name == "draw" else name for name in named if name != "total_weight"]
        return ("density", "k", *own) if self.budget else tuple(own)


@cache
def parameters_of(function: Callable[..., SparseDelta]) -> tuple[str, ...]:
    """Return the names of a function's parameters but for the delta, or deltas and weights."""
    known = ("delta", "deltas", "weights")
    return tuple(name for name in inspect.signature(function).parameters if name not in known)


METHODS: Mapping[str, Method] = {
    "sum": Method(weighted_sum, associative=True),
    "mean": Method(weighted_mean),
    "ties": Method(elected_mean, trim, density=1.0),
    "dare": Method(weighted_sum, drop, density=0.5),
    "dare_ties": Method(elected_mean, drop, density=0.5),
    "della": Method(elected_mean, mag_prune, density=0.5),
    "magnitude": Method(weighted_sum, budget=True),
    "magnitude_prune": Method(weighted_sum, trim, density=0.5),
}


def method_of(name: str, given: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Return the row of `METHODS`, and its options, checked, with defaults filled in."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}; there are {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    method = METHODS[name]
    for option in given:
        if option not in method.options:
            raise ConfigError(
                f"method {name!r} has no option {option!r}; it has "
                f"{', '.join(method.options) or 'none'}"
            )
    density = given.get("density", method.density)
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density is a share in (0, 1], not {density!r}")
    count = given.get("k")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ConfigError(f"k is a number of entries, not {count!r}")
    if count is not None and "density" in given:
        raise ConfigError("k and density are two ways to give one budget; give one of them")
    vote = given.get("majority_sign_method", "total")
    if vote not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method is 'total' or 'frequency', not {vote!r}")
    seed = given.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed is an integer, not {seed!r}")
    settings = {"density": density, "majority_sign_method": vote, "seed": seed}
    if "epsilon" in method.options:
        assert density is not None  # such methods have a default
        room = 2 * min(density, 1 - density)
        settings["epsilon"] = width = given.get("epsilon", min(EPSILON, room))
        if not 0 <= width <= room * (1 + 1e-9):
            raise ConfigError(
                f"epsilon={width} does not fit density={density}: density - epsilon / 2 and "
                f"density + epsilon / 2 are probabilities, so it is from 0 to {room:g}"
            )
    return method, settings
