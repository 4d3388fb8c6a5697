# SPDX-License-Identifier: Apache-2.0
"""Part of an adapter, and the same adapter in another dtype or on another device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, UnknownAdapterError, did_you_mean
from shira.fusing.metadata import derived_metadata
from shira.support import Support

Which = Iterable[str] | Callable[[str], bool] | Mapping[str, Support | SparseDelta]
"""Parameters, or positions in them."""


def restrict(adapter: Adapter, which: Which) -> Adapter:
    """What `Adapter.restrict` documents."""
    if callable(which):
        deltas = {name: delta for name, delta in adapter.items() if which(name)}
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if which(name)}
    elif isinstance(which, Mapping):
        beside = which.tensors if isinstance(which, Adapter) else {}
        _check_known(adapter, (*which, *beside))
        deltas = {
            name: _within(name, delta, which[name])
            for name, delta in adapter.items()
            if name in which
        }
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if name in beside}
        for name in which:
            if name in adapter.tensors:
                raise AdapterError(f"{name!r} is a whole tensor, which has no positions")
    else:
        wanted = {which} if isinstance(which, str) else set(which)
        _check_known(adapter, wanted)
        deltas = {name: delta for name, delta in adapter.items() if name in wanted}
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if name in wanted}
    kept = {name: value for name, value in adapter.metadata.items() if name == "fused"}
    return Adapter(deltas, {**derived_metadata([adapter], deltas, tensors), **kept}, tensors)


def cast(adapter: Adapter, dtype: torch.dtype | None, device: torch.device | str | None) -> Adapter:
    """What `Adapter.to` documents."""
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
    kept = support.positions_of(delta.support) >= 0
    indices = delta.support.indices[kept]
    return SparseDelta(Support._trusted(support.shape, indices), delta.values[kept])
