# SPDX-License-Identifier: Apache-2.0
"""Reading the weight of a base layer, wherever it is kept and whatever adapters are in it.

Accelerate's offloading leaves it on the meta device, ZeRO-3 and FSDP2 keep it in parts, a
parametrization computes it at each use. A merged adapter and an active `shira.Switch` have
overwritten some of its entries and keep the originals: masks, fingerprints and checks of the base
see those (`base_values`, `pristine`), not an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from shira.ops.memory import memory_of, offsets_of, settle
from shira.ops.patch import Overwritten, restored
from shira.store.names import gathered, is_sharded, whole
from shira.support import Support
from shira.tuner.quantized import backend_of


def base_of(layer: Any) -> Any:
    """Return the layer that is adapted, under whatever adapts it already."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def weight_of(base_layer: nn.Module) -> Tensor:
    """Return the layer's weight; of a quantized layer the packed one."""
    with at_rest([base_layer]):
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
    return weight


def stored_weight(layer: nn.Module) -> Any:
    """Return the base layer's weight as it is stored: packed, in parts, or None (GPTQ)."""
    base = base_of(layer)
    return None if is_computed(base) else getattr(base, "weight", None)


def is_computed(base_layer: nn.Module) -> bool:
    """Return whether the layer's weight is made from other parameters at each use.

    By ``torch.nn.utils.parametrize`` (weight_norm, spectral_norm, orthogonal), or by a hook before
    the forward (the older weight_norm and spectral_norm, pruning).
    """
    parametrizations = base_layer._modules.get("parametrizations")
    parametrized = parametrizations is not None and "weight" in parametrizations._modules
    made = parametrized or any(name.startswith("weight_") for name in base_layer._parameters)
    return made and "weight" not in base_layer._parameters


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """Make a module's own parameters readable for a while, wherever they are kept."""
    parameters = list(module.parameters(recurse=False))
    away = any(parameter.is_meta for parameter in parameters)
    here = align_module_device(module) if away else nullcontext()
    with here, gathered(parameters), at_rest([module]):
        yield


@contextmanager
def at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the reading of a computed weight from changing anything.

    spectral_norm improves its estimate, a buffer, at each reading in training mode.
    """
    computing = [
        m._modules["parametrizations"] for m in modules if "parametrizations" in m._modules
    ]
    training = [part for some in computing if some is not None for part in some.modules()]
    training = [part for part in training if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def base_values(layer: nn.Module, support: Support, gather: bool = False) -> Tensor | None:
    """Return ``(k,)`` values of the base under an adapter's entries.

    Args:
        layer: The base layer, or an adapted one.
        support: On a weight of that shape.
        gather: Make a weight whole that FSDP2 has sharded, which is a collective call.

    Returns:
        In the weight's dtype and on its device. None where the values are not there as numbers: on
        the meta device, or packed by quantization. What Accelerate has offloaded or ZeRO-3 has
        partitioned is fetched, weight by weight.
    """
    base = base_of(layer)
    if backend_of(base) is not None:
        return None
    with readable(base):
        weight: Tensor = base.weight
        settle(weight)
        values = values_at(whole(weight) if gather else weight, support)
        if values is None:
            return None
        offsets = offsets_of(support.indices.to(weight.device), weight.shape, weight.stride())
        return restored(values, offsets, *_overwritten(layer, weight))


def pristine(layer: nn.Module) -> nn.Module:
    """Return the base layer, to be looked at: a copy that holds the base if adapters are in it.

    The copy has a weight of m x n entries of its own: a mask that looks at the weight looks at all
    of it.

    Args:
        layer: The base layer, or an adapted one.
    """
    base, copied = base_of(layer), None
    with readable(base):
        weight = stored_weight(layer)
        settle(weight)
        for record in _overwritten(layer, weight):
            copied = weight.detach().clone() if copied is None else copied
            memory_of(copied).index_copy_(0, record.offsets.long(), record.originals)
    if copied is None:
        return base  # type: ignore[no-any-return]
    stand_in: nn.Module = copy.copy(base)
    stand_in._parameters = {**base._parameters, "weight": nn.Parameter(copied, requires_grad=False)}
    return stand_in


def with_originals(state_dict: dict[str, Any], key: str, layer: nn.Module) -> None:
    """Put the base's values into a layer's weight in a state dict that was taken while merged.

    Args:
        state_dict: Changed in place; its tensors are not.
        key: Of the weight.
        layer: With the adapters merged that were merged when the state dict was taken.
    """
    undo, given = getattr(layer, "_undo", None), state_dict.get(key)
    if not isinstance(given, Tensor):
        return
    if given.data_ptr() == stored_weight(layer).data_ptr():
        state_dict[key] = stored_weight(pristine(layer)).detach()
        return
    if undo is None:
        return
    support = Support(undo.plan.weight_shape, undo.plan.flat())
    found, merged = (values_at(weight, support) for weight in (given, base_of(layer).weight))
    if found is None or merged is None or not torch.equal(found.to(merged), merged):
        return
    copied = given.detach().clone(memory_format=torch.contiguous_format)
    flat = support.indices.long().to(copied.device)
    state_dict[key] = copied
    copied.view(-1).index_copy_(0, flat, undo.originals.to(copied.device, copied.dtype))


def values_at(weight: Tensor, support: Support) -> Tensor | None:
    """Return ``(k,)`` entries of a weight, or None if it does not hold them all as numbers."""
    if (
        weight.is_meta
        or is_sharded(weight)
        or not weight.is_floating_point()
        or weight.shape != torch.Size(support.shape)
    ):
        return None
    offsets = offsets_of(support.indices.to(weight.device), weight.shape, weight.stride())
    return memory_of(weight.detach()).index_select(0, offsets)


def _overwritten(layer: nn.Module, weight: Tensor) -> list[Overwritten]:
    """Return what adapters have overwritten in a weight, the latest first."""
    undo = getattr(layer, "_undo", None)
    patch = getattr(weight, "shira_patch", None)  # of `shira.Switch`
    records = [] if undo is None else [undo.record(weight)]
    if patch is not None:
        offsets, originals = patch.offsets.to(weight.device), patch.originals
        records.append(Overwritten(offsets, originals.to(weight.device, weight.dtype)))
    return [record for record in records if record.nnz]
