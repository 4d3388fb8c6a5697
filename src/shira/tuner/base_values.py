# SPDX-License-Identifier: Apache-2.0
"""The base model's values, whatever adapters hold the place of some of them at the moment.

A merged adapter and an active `shira.Switch` keep what they overwrote. Masks, fingerprints and
checks of the base read through here, so that they see the base and not an adapter in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shira.ops.memory import memory_of, settle
from shira.ops.patch import memory_offsets
from shira.store.sharded import is_sharded, whole
from shira.support import Support
from shira.tuner.elsewhere import is_computed, readable
from shira.tuner.quantized import backend_of


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
        for offsets, originals in _overwritten(layer, weight):
            order = torch.argsort(offsets)
            held, originals = offsets[order], originals[order]
            flat = support.indices.to(weight.device)
            wanted = memory_offsets(flat, weight.shape, weight.stride())
            at = torch.searchsorted(held, wanted.to(held.dtype)).clamp_(max=len(held) - 1)
            values = torch.where(held[at] == wanted, originals[at], values)
        return values


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
        for offsets, originals in _overwritten(layer, weight):
            copied = weight.detach().clone() if copied is None else copied
            memory_of(copied).index_copy_(0, offsets.long(), originals)
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
    offsets = memory_offsets(support.indices.to(weight.device), weight.shape, weight.stride())
    return memory_of(weight.detach()).index_select(0, offsets)


def base_of(layer: Any) -> Any:
    """Return the layer that is adapted, under whatever adapts it already."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def stored_weight(layer: nn.Module) -> Any:
    """Return the base layer's weight as it is stored: packed, in parts, or None (GPTQ)."""
    base = base_of(layer)
    return None if is_computed(base) else getattr(base, "weight", None)


def _overwritten(layer: nn.Module, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield places in a weight's memory and what was there, the latest adapter first."""
    undo = getattr(layer, "_undo", None)
    patch = getattr(weight, "shira_patch", None)  # of `shira.Switch`
    records = [(undo.plan.offsets(), undo.originals)] if undo is not None else []
    records += [(patch.offsets, patch.originals)] if patch is not None else []
    for offsets, originals in records:
        if len(offsets):
            yield offsets.to(weight.device), originals.to(weight.device, weight.dtype)
