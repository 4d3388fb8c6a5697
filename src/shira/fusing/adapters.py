# SPDX-License-Identifier: Apache-2.0
"""`fuse`: several adapters made one.

For each parameter: thin each delta as the method says, bring them together on the union of their
positions, combine. The cost is that of the entries; no weight and no base model is looked at.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.fusing.arguments import (
    checked_adapters,
    checked_method,
    checked_weights,
    settings_of,
)
from shira.fusing.checks import check_together
from shira.fusing.draws import digest, uniform
from shira.fusing.metadata import derived_metadata, record
from shira.fusing.methods import Method, Settings
from shira.fusing.pruning import keep_largest
from shira.fusing.whole import whole_tensors

Progress = Callable[[int, int], None]
"""Called with how many parameters are done, and of how many."""


def fuse(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    *,
    density: float | None = None,
    k: int | None = None,
    epsilon: float | None = None,
    majority_sign_method: str | None = None,
    seed: int | None = None,
    whole: str | None = None,
    check_base: bool = True,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Combine adapters into one, on the union of their positions; absent positions are zeros.

    One adapter at weight 1 is returned as it is, whatever the method, but for ``magnitude`` with a
    budget. Otherwise the values are float32 (float64 if one of the adapters' are), so that nothing
    is lost before `Adapter.to` or ``save(dtype=)`` rounds them. Every method is commutative bit for
    bit; ``sum`` is associative: the positions exactly, the values to rounding.

    Whole tensors (`Adapter.tensors`) are carried as they are, never summed or scaled. Two different
    ones of one name, or one in an adapter at another weight than 1, are refused unless ``whole``
    says whose the result has.

    Args:
        adapters: At least one.
        weights: A factor for each; default 1 each.
        method: One of `METHODS`: ``sum``, ``mean``, ``ties``, ``dare``, ``dare_ties``, ``della``,
            ``magnitude``, ``magnitude_prune``.
        density: For ``magnitude``, of the result, as `Adapter.density` counts it. For the others
            PEFT's density: the share of each adapter's own entries that stays, in (0, 1]; default 1
            for ``ties``, else 0.5.
        k: For ``magnitude``: entries of the result, over all parameters together. Default, if no
            density is given either: those of the largest of the adapters.
        epsilon: For ``della``: the width of its range of probabilities around ``density``; default
            0.1.
        majority_sign_method: How ``ties`` and its kin elect: ``"total"`` (default) or
            ``"frequency"``.
        seed: For ``dare`` and ``della``; default 0. No global generator is used.
        whole: The name of the adapter whose whole tensors the result has; those of the others are
            left out.
        check_base: Refuse adapters that record different base models.
        names: What to call the adapters in errors and in the record of how the result was made,
            and for ``whole``; default ``"adapter 0"``, ``"adapter 1"``, ...
        progress: Told after each parameter how far it is.

    Returns:
        The fused adapter. ``metadata["fused"]`` tells how it was made.

    Raises:
        AdapterError: If there is no adapter, or a parameter has different shapes, or is whole in
            one adapter and has another tensor or a delta in another.
        WrongBaseError: If they were trained on different base models.
        ConfigError: If method, weights or options are not possible.
    """
    adapters, names = checked_adapters(adapters, names)
    chosen = checked_method(method)
    factors = checked_weights(weights, len(adapters), method)
    given = {
        "density": density,
        "k": k,
        "epsilon": epsilon,
        "majority_sign_method": majority_sign_method,
        "seed": seed,
    }
    given = {option: value for option, value in given.items() if value is not None}
    settings = settings_of(method, chosen, given, math.fsum(factors))
    check_together(adapters, names, check_base=check_base)
    if len(adapters) == 1 and factors == [1.0] and whole in (None, names[0]):
        return _alone(adapters[0], names[0], chosen, given)
    tensors = whole_tensors(adapters, names, factors, whole)
    parameters = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    deltas: dict[str, SparseDelta] = {}
    for done, name in enumerate(parameters, 1):
        parts = [(a[name], w) for a, w in zip(adapters, factors, strict=True) if name in a]
        deltas[name] = _fuse_parameter(name, parts, chosen, settings)
        if progress is not None:
            progress(done, len(parameters))
    options = {option: getattr(settings, option) for option in chosen.options if option != "k"}
    if chosen.budget:
        count = _budget(adapters, deltas, given)
        deltas = keep_largest(deltas, count)
        options = {"k": count}
    made = record(method, adapters, names, factors, options)
    return Adapter(deltas, derived_metadata(adapters, deltas, tensors, made), tensors)


def _alone(adapter: Adapter, name: str, method: Method, given: Mapping[str, Any]) -> Adapter:
    """One adapter at weight 1: itself, or pruned to a budget that was asked for."""
    if method.budget and given:
        count = _budget([adapter], adapter, given)
        if count >= adapter.nnz:
            return adapter
        deltas = keep_largest(adapter, count)
        made = record("magnitude", [adapter], [name], [1.0], {"k": count})
        tensors = adapter.tensors
        return Adapter(deltas, derived_metadata([adapter], deltas, tensors, made), tensors)
    if "density" in given:
        warnings.warn(
            f"there is nothing to fuse {name} with, so it is returned unchanged and density="
            f"{given['density']} has no effect; Adapter.prune makes one adapter sparser",
            stacklevel=3,
        )
    return adapter


def _fuse_parameter(
    name: str, parts: Sequence[tuple[SparseDelta, float]], method: Method, settings: Settings
) -> SparseDelta:
    """The deltas of one parameter, with their weights, made one."""
    prints: list[bytes] = [b""] * len(parts)
    if method.random or len(parts) > 2:  # two numbers have the same sum in either order
        prints = [digest(delta) for delta, _ in parts]
        order = sorted(range(len(parts)), key=lambda i: (prints[i], parts[i][1]))
        parts, prints = [parts[i] for i in order], [prints[i] for i in order]
    deltas = [delta for delta, _ in parts]
    if method.sparsify is not None:
        deltas = [
            method.sparsify(delta, settings, _draw(delta, settings.seed, name, prints, i))
            for i, delta in enumerate(deltas)
        ]
    return method.combine(deltas, [weight for _, weight in parts], settings)


def _draw(
    delta: SparseDelta, seed: int, name: str, prints: Sequence[bytes], i: int
) -> Callable[[], Tensor]:
    return lambda: uniform(delta.nnz, seed, name, prints[i], prints[:i].count(prints[i]))


def _budget(
    adapters: Sequence[Adapter], deltas: Mapping[str, SparseDelta], given: Mapping[str, Any]
) -> int:
    """How many entries the result may have."""
    if "density" in given:
        numel = sum(delta.support.numel for delta in deltas.values())
        return int(given["density"] * numel * (1 + 1e-12))  # 0.29 * 100 is 28.999...
    return int(given.get("k", max(adapter.nnz for adapter in adapters)))
