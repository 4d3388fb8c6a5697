# SPDX-License-Identifier: Apache-2.0
"""Undoing: the originals under merged adapters, and a model as it was before a failed operation.

A merged adapter and an active `shira.Switch` keep the base's values that they overwrote. Unmerging
puts them back; masks, fingerprints and checks of the base read through them (`base_values`,
`pristine`), so that they see the base and not an adapter in it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shira.base import replacement
from shira.ops import Plan, plan_for
from shira.ops.memory import memory_of, settle, write_to
from shira.ops.native import Entered
from shira.ops.patch import memory_offsets
from shira.ops.private_memory import make_private
from shira.ops.resident import Overwritten, compiled_for, entered
from shira.ops.write_count import WriteCount, count_write, one_write, take_back
from shira.store.sharded import is_sharded, whole
from shira.support import Support
from shira.tuner.base_layer import base_of, readable, stored_weight
from shira.tuner.quantized import backend_of

_CONTAINERS = (dict, OrderedDict, list, set)


# ------------------------------------------------------------------------------------------ merging


@dataclass(frozen=True, eq=False)
class Undo:
    """The originals of the entries that a merge has overwritten."""

    plan: Plan
    originals: Tensor
    """``(k,)`` in the dtype that the weight had."""
    count: WriteCount

    def restore(self, weight: Tensor, commit: Callable[[], None]) -> None:
        """Put the originals back; the weight may have been moved or cast since.

        Args:
            weight: Into which the merge wrote.
            commit: Notes that the originals are back; called once or twice. An interrupt does not
                keep the two apart: they are then both done before it is raised.
        """
        write = _Restoring(self, weight, commit)
        write_to(write.data, write, lambda data: None, lasting=True)


class _Restoring:
    """The write of an unmerge: to undo it is to complete it, so that it is never left half done."""

    def __init__(self, undo: Undo, weight: Tensor, commit: Callable[[], None]) -> None:
        self.undo, self.weight, self.commit = undo, weight, commit
        make_private(weight)
        self.data = weight.data
        self.originals = undo.originals.to(weight.device, weight.dtype)

    def put_in(self) -> None:
        """See `Write`."""
        plan, kernels = self.undo.plan, compiled_for(self.data, self.originals)
        if kernels is not None and plan.gaps is not None:
            kernels.leave(self.data, plan.gaps, self.originals)
        else:
            offsets = plan.offsets().to(self.data.device)
            memory_of(self.data).index_copy_(0, offsets, self.originals)
        take_back(self.weight, self.undo.count)
        self.commit()

    put_back = put_in


def merge_into(
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    earlier: Undo | None,
    commit: Callable[[Undo | None], None],
    check: Callable[[Tensor], None] | None = None,
) -> None:
    """Overwrite the entries of adapters with their replacement values, and let autograd know.

    Several adapters are summed before the one rounding, so always from the originals. If anything
    raises, an interrupt included, the weight is as it was.

    Args:
        weight: The base weight, perhaps with other adapters merged already.
        deltas: ``(k_i,)`` for each adapter that is to be in the weight afterwards, those that are
            in it already among them.
        indices: int32 ``(2, k_i)`` for each, or packed.
        earlier: Of the adapters that are in it now.
        commit: Notes what undoes this merge; called with ``earlier`` when that counts again.
        check: Is given all replacement values ``(k,)`` before anything is written, and may raise.
    """
    plan = plan_for(indices, weight.shape, weight.stride())
    delta = plan.combine(deltas).detach()
    make_private(weight)
    data = weight.data

    def new(there: Tensor) -> Tensor:
        result = replacement(_originals(there, plan, earlier, data), delta)
        if check is not None:
            check(result)
        return result

    write: Entered | Overwritten
    if earlier is None and check is None:
        write = entered(data, plan, delta)  # in one pass, if compiled
    else:
        write = Overwritten(data, plan.offsets().to(data.device), new)

    def note(data: Tensor) -> None:
        there = write.originals
        assert there is not None
        originals = _originals(there, plan, earlier, data)
        count = count_write(weight, earlier.count if earlier else None)
        commit(Undo(plan, originals, count))

    write_to(data, _Merging(write, weight, partial(commit, earlier)), note, lasting=True)


class _Merging:
    """The write of a merge; when it is put back, that is noted where the merge was."""

    def __init__(
        self, write: Entered | Overwritten, weight: Tensor, undone: Callable[[], None]
    ) -> None:
        self.write, self.weight, self.undone = write, weight, undone
        self.count = one_write(weight)

    def put_in(self) -> None:
        """See `Write`."""
        self.write.put_in()

    def put_back(self) -> None:
        """See `Write`."""
        self.write.put_back()
        take_back(self.weight, self.count)
        self.undone()


def _originals(there: Tensor, plan: Plan, earlier: Undo | None, data: Tensor) -> Tensor:
    """Return ``(k,)``: what the base holds at a plan's entries, given what is there now."""
    if earlier is None:
        return there
    # Entries of the earlier merge hold replacements now; their originals are in its undo. All of
    # them are in the union, since adapters that were merged stay merged.
    offsets, originals = plan.offsets().to(data.device), there.clone()
    order = torch.argsort(offsets)
    held = earlier.plan.offsets().to(data.device)
    place = order[torch.searchsorted(offsets[order], held)]
    originals[place] = earlier.originals.to(data.device, data.dtype)
    return originals


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


def _overwritten(layer: nn.Module, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield places in a weight's memory and what was there, the latest adapter first."""
    undo = getattr(layer, "_undo", None)
    patch = getattr(weight, "shira_patch", None)  # of `shira.Switch`
    records = [(undo.plan.offsets(), undo.originals)] if undo is not None else []
    records += [(patch.offsets, patch.originals)] if patch is not None else []
    for offsets, originals in records:
        if len(offsets):
            yield offsets.to(weight.device), originals.to(weight.device, weight.dtype)


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
