# SPDX-License-Identifier: Apache-2.0
"""The arguments of `shira.fuse`, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shira.adapter import Adapter
from shira.errors import AdapterError, ConfigError, did_you_mean
from shira.fusing.methods import EPSILON, METHODS, Method, Settings


def checked_adapters(
    adapters: Sequence[Adapter], names: Sequence[str] | None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, and what each is called."""
    if isinstance(adapters, Adapter) or not hasattr(adapters, "__iter__"):
        raise AdapterError(f"fuse takes a list of adapters, not {type(adapters).__name__}")
    adapters = list(adapters)
    if not adapters:
        raise AdapterError("there is nothing to fuse: no adapter was given")
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                f"fuse takes adapters, not {type(adapter).__name__}; Adapter.load reads one, "
                "Adapter.from_model takes one out of a model"
            )
    names = [f"adapter {i}" for i in range(len(adapters))] if names is None else list(names)
    if len(names) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters need as many names, not {len(names)}")
    return adapters, names


def checked_method(method: str) -> Method:
    """The row of `METHODS`."""
    if method not in METHODS:
        raise ConfigError(
            f"unknown method {method!r}; there are {', '.join(METHODS)}."
            f"{did_you_mean(method, METHODS)}"
        )
    return METHODS[method]


def checked_weights(weights: Sequence[float] | None, count: int, method: str) -> list[float]:
    """A finite factor for each adapter."""
    if weights is None:
        weights = [1.0] * count
    if isinstance(weights, (str, Adapter)) or not hasattr(weights, "__iter__"):
        raise ConfigError(f"weights are a list of numbers, not {type(weights).__name__}")
    try:
        factors = [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"weights are numbers: {error}") from error
    if len(factors) != count:
        raise ConfigError(f"{count} adapters need as many weights, not {len(factors)}: {factors}")
    if not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(f"weights are finite numbers, not {factors}")
    if method == "mean" and math.fsum(factors) == 0:
        raise ConfigError(f"the weights of a mean must not add up to 0, as {factors} do")
    return factors


def settings_of(
    name: str, method: Method, given: Mapping[str, Any], total_weight: float
) -> Settings:
    """The options of a method, defaults filled in; one that it does not have is an error."""
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
    width = 0.0
    if "epsilon" in method.options:
        assert density is not None  # such methods have a default
        room = 2 * min(density, 1 - density)
        width = given.get("epsilon", min(EPSILON, room))
        if not 0 <= width <= room * (1 + 1e-9):
            raise ConfigError(
                f"epsilon={width} does not fit density={density}: density - epsilon / 2 and "
                f"density + epsilon / 2 are probabilities, so it is from 0 to {room:g}"
            )
    return Settings(1.0 if density is None else density, width, vote, seed, total_weight)
