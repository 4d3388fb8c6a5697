# SPDX-License-Identifier: Apache-2.0
"""Undoing: the originals under merged adapters, and a model as it was before a failed operation.

A merged adapter and an active `shira.Switch` keep the base's values that they overwrote. Unmerging
puts them back; masks, fingerprints and checks of the base read through them (`base_values`,
`pristine`), so that they see the base and not an adapter in it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shira.ops.memory import memory_of, offsets_of, settle
from shira.ops.patch import Overwritten, restored
from shira.store.sharded import is_sharded, whole
from shira.support import Support
from shira.tuner.base_layer import base_of, readable, stored_weight
from shira.tuner.quantized import backend_of

_CONTAINERS = (dict, OrderedDict, list, set)


# ------------------------------------------------------------------------------------------ reading


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


# ------------------------------------------------------------------------------------- rolling back


@contextmanager
def as_it_was(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Put a model's modules, parameters and settings back if the body raises.

    What modules hold is put back: submodules, parameters and their ``requires_grad``, modes,
    configurations, hooks. The values of tensors are not: who writes to them checks before.

    Args:
        model: Whose modules the body may replace.
        kind: Put back only if the model has a module of this class then.
    """
    modules = [(module, _contents(module.__dict__)) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if not any(isinstance(module, kind) for module in model.modules()):
            raise
        for module, (attributes, containers) in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, before in containers:
                container.clear()
                if isinstance(container, list):
                    container.extend(before)
                else:
                    container.update(before)
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        raise


def _contents(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Attributes, and copies of the containers among them, which are to stay the same objects."""
    containers = [value for value in attributes.values() if type(value) in _CONTAINERS]
    return dict(attributes), [(value, copy.copy(value)) for value in containers]
