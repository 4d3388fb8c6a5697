# SPDX-License-Identifier: Apache-2.0
"""Adapters made from adapters, at the cost of their entries; knows of no model, file or PEFT."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, UnknownAdapterError, did_you_mean
from shira.fusing.methods import (
    METHODS,
    Method,
    digest,
    keep_largest,
    method_of,
    parameters_of,
    select,
    uniform,
)
from shira.fusing.result import (
    FUSED,
    check_adapters,
    check_together,
    derived,
    record,
    whole_tensors,
)
from shira.support import Support, matrix_shape

__all__ = ["METHODS", "Method", "cast", "fill_to_rank", "fuse", "keep_largest", "restrict"]

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

    Example:
        >>> supports = [Support((2, 3), torch.tensor(at)) for at in ([0, 4], [4, 5])]
        >>> a, b = (Adapter({"w": SparseDelta(at, torch.ones(2))}) for at in supports)
        >>> fused = fuse([a, b], [1.0, 0.5])["w"]
        >>> fused.support.indices.tolist(), fused.values.tolist()
        ([0, 4, 5], [1.0, 1.5, 0.5])
    """
    if isinstance(adapters, Adapter) or not hasattr(adapters, "__iter__"):
        raise AdapterError(f"fuse takes a list of adapters, not {type(adapters).__name__}")
    adapters = list(adapters)
    if not adapters:
        raise AdapterError("there is nothing to fuse: no adapter was given")
    check_adapters(*adapters)
    names = [f"adapter {i}" for i in range(len(adapters))] if names is None else list(names)
    if len(names) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters need as many names, not {len(names)}")
    factors = _checked_weights(weights, len(adapters), method)
    options = {
        "density": density,
        "k": k,
        "epsilon": epsilon,
        "majority_sign_method": majority_sign_method,
        "seed": seed,
    }
    given = {option: value for option, value in options.items() if value is not None}
    chosen, settings = method_of(method, given)
    settings["total_weight"] = math.fsum(factors)
    check_together(adapters, names, check_base=check_base)
    alone = len(adapters) == 1 and factors == [1.0] and whole in (None, names[0])
    if alone and not chosen.budget and density is not None:
        warnings.warn(
            f"there is nothing to fuse {names[0]} with, so it is returned unchanged and density="
            f"{density} has no effect; Adapter.prune makes one adapter sparser",
            stacklevel=2,
        )
    if alone and not (chosen.budget and given):
        return adapters[0]
    tensors = whole_tensors(adapters, names, factors, whole)
    parameters = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    deltas: dict[str, SparseDelta] = {}
    for done, name in enumerate(parameters, 1):
        parts = [(a[name], w) for a, w in zip(adapters, factors, strict=True) if name in a]
        deltas[name] = parts[0][0] if alone else _fuse_parameter(name, parts, chosen, settings)
        if progress is not None:
            progress(done, len(parameters))
    options = {option: settings[option] for option in chosen.options if option != "k"}
    if chosen.budget:
        count = max(adapter.nnz for adapter in adapters) if k is None else k
        if density is not None:
            numel = sum(delta.support.numel for delta in deltas.values())
            count = int(density * numel * (1 + 1e-12))  # 0.29 * 100 is 28.999...
        if alone and count >= adapters[0].nnz:
            return adapters[0]
        options, deltas = {"k": count}, keep_largest(deltas, count)
    return derived(adapters, deltas, tensors, record(method, adapters, names, factors, options))


def restrict(
    adapter: Adapter,
    which: Iterable[str] | Callable[[str], bool] | Mapping[str, Support | SparseDelta],
) -> Adapter:
    """Return part of an adapter; see `Adapter.restrict`.

    Example:
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([0, 4])), torch.tensor([1.0, 2.0]))
        >>> adapter = Adapter({"a.weight": delta, "b.weight": delta})
        >>> list(restrict(adapter, ["b.weight"]))
        ['b.weight']
        >>> restrict(adapter, {"a.weight": Support((2, 3), torch.tensor([4]))})["a.weight"].values
        tensor([2.])
    """
    if isinstance(which, Mapping):
        beside = which.tensors if isinstance(which, Adapter) else {}
        _check_known(adapter, (*which, *beside))
        for name in which:
            if name in adapter.tensors:
                raise AdapterError(f"{name!r} is a whole tensor, which has no positions")
        deltas = {n: _within(n, delta, which[n]) for n, delta in adapter.items() if n in which}
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if name in beside}
    else:
        if callable(which):
            wanted = {name for name in (*adapter, *adapter.tensors) if which(name)}
        else:
            wanted = {which} if isinstance(which, str) else set(which)
            _check_known(adapter, wanted)
        deltas = {name: delta for name, delta in adapter.items() if name in wanted}
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if name in wanted}
    return derived([adapter], deltas, tensors, adapter.metadata.get(FUSED))


def cast(adapter: Adapter, dtype: torch.dtype | None, device: torch.device | str | None) -> Adapter:
    """Return an adapter in another dtype or on another device; see `Adapter.to`."""
    if dtype is not None and not dtype.is_floating_point:
        raise AdapterError(f"values are floating point, not {dtype}")
    deltas = {}
    for name, delta in adapter.items():
        values = delta.values.to(dtype=dtype, device=device)
        lost = int((delta.values.isfinite() & ~values.isfinite().to(delta.values.device)).sum())
        if lost:
            raise AdapterError(
                f"{lost} values of {name!r} are too large for {dtype}: the largest is "
                f"{float(delta.values.abs().max()):g}; torch.bfloat16 has the range of float32"
            )
        support = delta.support if device is None else delta.support.to(device)
        deltas[name] = SparseDelta(support, values)
    tensors = {name: tensor.to(device=device) for name, tensor in adapter.tensors.items()}
    return Adapter(deltas, adapter.metadata, tensors)


def fill_to_rank(adapter: Adapter) -> tuple[int, Adapter]:
    """Add zeros until every weight has ``r * (m + n)`` entries, for the least r with room for all.

    PEFT's own SHiRA loads nothing else: it makes room for r * (m + n) values in each weight before
    it reads a file. Where a weight is too small for that, all deltas stay as they are, and r is the
    largest that fits; PEFT's own SHiRA cannot load such an adapter. Nor can it one of parameters
    that are no module's ``weight``, as experts; there they stay as they are too.

    Args:
        adapter: Of any number of entries in each weight.

    Returns:
        r, and the adapter; its metadata are the same but for ``r``.

    Example:
        >>> delta = SparseDelta(Support((3, 4), torch.tensor([0, 11])), torch.ones(2))
        >>> r, filled = fill_to_rank(Adapter({"w": delta}))
        >>> r, filled["w"].support.indices.tolist()
        (1, [0, 1, 2, 3, 4, 5, 11])
    """
    others = [name for name in adapter if "." in name and not name.endswith(".weight")]
    if adapter.metadata.get("target_parameters") or others:
        known = adapter.metadata.get("r")
        return known if isinstance(known, int) else 1, adapter
    sides = {name: sum(matrix_shape(d.support.shape)) for name, d in adapter.items()}
    sides = {name: side for name, side in sides.items() if side}
    r = max([1, *(-(-adapter[name].nnz // side) for name, side in sides.items())])
    if all(r * side <= adapter[name].support.numel for name, side in sides.items()):
        filled = {n: filled_up(delta, r * sides.get(n, 0)) for n, delta in adapter.items()}
        return r, Adapter(filled, {**adapter.metadata, "r": r}, adapter.tensors)
    most = min(adapter[name].support.numel // side for name, side in sides.items())
    return max(1, min(r, most)), adapter


def _checked_weights(weights: Sequence[float] | None, count: int, method: str) -> list[float]:
    """Return a finite factor for each adapter."""
    if isinstance(weights, str):
        raise ConfigError(f"weights are a list of numbers, not {weights!r}")
    try:
        factors = [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"weights are numbers: {error}") from error
    if len(factors) != count:
        raise ConfigError(f"{count} adapters need as many weights, not {len(factors)}: {factors}")
    if not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(f"weights are finite numbers, not {factors}")
    if method == "mean" and math.fsum(factors) == 0:
        raise ConfigError(f"the weights of a mean must not add up to 0, as {factors} do")
    return factors


def _fuse_parameter(
    name: str,
    parts: Sequence[tuple[SparseDelta, float]],
    method: Method,
    settings: Mapping[str, Any],
) -> SparseDelta:
    """Make one of the deltas of a parameter, with their weights."""
    prints: list[bytes] = [b""] * len(parts)
    if method.random or len(parts) > 2:  # two numbers have the same sum in either order
        prints = [digest(delta) for delta, _ in parts]
        order = sorted(range(len(parts)), key=lambda i: (prints[i], parts[i][1]))
        parts, prints = [parts[i] for i in order], [prints[i] for i in order]
    deltas = [delta for delta, _ in parts]
    if method.sparsify is not None:
        for i, delta in enumerate(deltas):
            told = dict(settings)
            if method.random:
                same = prints[:i].count(prints[i])
                told["draw"] = uniform(delta.nnz, settings["seed"], name, prints[i], same)
            known = {option: told[option] for option in parameters_of(method.sparsify)}
            deltas[i] = method.sparsify(delta, **known)
    known = {option: settings[option] for option in parameters_of(method.combine)}
    return method.combine(deltas, [weight for _, weight in parts], **known)


def _check_known(adapter: Adapter, names: Iterable[str]) -> None:
    for name in names:
        if name not in adapter and name not in adapter.tensors:
            raise UnknownAdapterError(
                f"the adapter has no parameter {name!r} to restrict it to."
                f"{did_you_mean(name, (*adapter, *adapter.tensors))}"
            )


def _within(name: str, delta: SparseDelta, where: Support | SparseDelta) -> SparseDelta:
    support = where.support if isinstance(where, SparseDelta) else where
    if not isinstance(support, Support):
        raise AdapterError(f"{name!r} is restricted to a Support, not {type(where).__name__}")
    if support.shape != delta.support.shape:
        raise AdapterError(
            f"{name!r} has shape {delta.support.shape}; a support of shape {support.shape} does "
            "not fit it"
        )
    return select(delta, support.positions_of(delta.support) >= 0)


def filled_up(delta: SparseDelta, k: int) -> SparseDelta:
    """Add zeros at the delta's first free positions, so that it has k entries of a larger weight.

    A delta of k entries or more stays as it is.
    """
    missing = k - delta.nnz
    if missing <= 0:
        return delta
    indices = delta.support.indices
    taken = torch.zeros(k, dtype=torch.bool, device=indices.device)
    taken[indices[indices < k].long()] = True  # of the first k positions, so many are free at least
    free = (~taken).nonzero().squeeze(1)[:missing]
    merged, order = torch.cat((indices.long(), free)).sort()
    values = torch.cat((delta.values, delta.values.new_zeros(missing)))
    return SparseDelta(Support._trusted(delta.support.shape, merged), values[order])
