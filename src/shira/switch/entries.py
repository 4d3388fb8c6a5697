# SPDX-License-Identifier: Apache-2.0
"""From adapters to what is written into each weight: one alone, at a scale, and several together.

All that costs more than writing is done here, beforehand: positions become places in memory,
originals are read, replacement values are made and rounded once. Each step costs O(k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shira.base import accumulation_dtype, replacement
from shira.delta import SparseDelta
from shira.errors import AdapterError
from shira.ops.memory import memory_of, offsets_of
from shira.ops.patch import Patch, base_at, same_bits
from shira.support import align_indices, index_dtype
from shira.switch.weights import P, Place


class Entry(NamedTuple):
    """One adapter on one weight."""

    values: Tensor | None
    """``(k,)`` deltas in the order of the patch, on the weight's device; None if the patch is of
    every entry, by a whole tensor, which has no scale and is summed with nothing."""
    patch: Patch
    """At scale 1."""


def make_entry(
    change: SparseDelta | Tensor, weight: Tensor, active: Patch | None
) -> tuple[Entry, Tensor]:
    """Return an adapter's entry on a weight, and the originals in the order of its support.

    A whole tensor is rounded once to the weight's dtype and costs what the weight has entries; what
    is ``active`` in the weight is seen through. `AdapterError` if a finite original stays not so.
    """
    if isinstance(change, SparseDelta):
        flat = change.support.indices.to(weight.device).contiguous()
        values = change.values.detach().to(weight.device)
    else:
        flat = torch.arange(weight.numel(), dtype=index_dtype(weight.numel()), device=weight.device)
        values = change.detach().to(weight.device, weight.dtype, copy=True).reshape(-1).contiguous()
    offsets = offsets_of(flat, weight.shape, weight.stride())
    order = None
    if offsets is not flat:
        offsets, order = offsets.sort()
        offsets = offsets.to(index_dtype(memory_of(weight.data).numel()))
        values = values[order]
    originals = flat_originals = base_at(weight, offsets, active)
    if order is not None:
        flat_originals = torch.empty_like(originals)
        flat_originals[order] = originals
    if isinstance(change, SparseDelta):
        return Entry(values, make_patch(offsets, originals, values)), flat_originals
    return Entry(None, _finite(Patch(offsets, originals, values))), flat_originals


def combined(members: Sequence[tuple[str, float, Mapping[P, Entry]]]) -> dict[P, Patch]:
    """Return the patches of several adapters, each with its name, scale and entries.

    Deltas are summed in this order, in float32 (float64 if the weight or one of the deltas is), and
    rounded once. `AdapterError` if a finite original stays not so, or one adapter replaces a whole
    weight and another changes it to something else.
    """
    plan = {}
    for place in dict.fromkeys(place for _, _, entries in members for place in entries):
        here = [(name, each[place], scale) for name, scale, each in members if place in each]
        whole = [(name, entry) for name, entry, _ in here if entry.values is None]
        if whole:
            _check_all_are(whole[0], here, place)
            plan[place] = whole[0][1].patch
            continue
        try:
            plan[place] = _summed(
                [(e.values, e.patch, scale) for _, e, scale in here if e.values is not None]
            )
        except AdapterError as error:
            scales = {name: scale for name, scale, _ in members}
            raise AdapterError(f"{scales}, parameter {place.name!r}: {error}") from None
    return plan


def _check_all_are(
    whole: tuple[str, Entry], here: Sequence[tuple[str, Entry, float]], place: Place
) -> None:
    for name, (values, patch), _ in here:
        if values is not None or not same_bits(patch.replacement, whole[1].patch.replacement):
            raise AdapterError(
                f"adapters {whole[0]!r} and {name!r} cannot be active together: the first replaces "
                f"the whole of {place.name!r}, and the second changes it to something else"
            )


def _summed(deltas: Sequence[tuple[Tensor, Patch, float]]) -> Patch:
    (values, patch, scale), *others = deltas
    wide = accumulation_dtype(patch.originals.dtype, *(values.dtype for values, _, _ in deltas))
    if not others:
        if scale == 1.0:
            return patch
        return make_patch(patch.offsets, patch.originals, values.to(wide) * scale)
    offsets, places = align_indices([patch.offsets for _, patch, _ in deltas])
    originals = patch.originals.new_empty(offsets.numel())
    total = torch.zeros(offsets.numel(), dtype=wide, device=originals.device)
    for (values, patch, scale), at in zip(deltas, places, strict=True):
        originals.index_copy_(0, at, patch.originals)
        total.index_add_(0, at, values.to(wide) * scale)
    return make_patch(offsets, originals, total)


def make_patch(offsets: Tensor, originals: Tensor, delta: Tensor) -> Patch:
    """Return the patch of ``(k,)`` deltas; `AdapterError` if a finite original stays not so."""
    return _finite(Patch(offsets, originals, replacement(originals, delta)))


def _finite(patch: Patch) -> Patch:
    new = patch.replacement
    bad = ~torch.isfinite(new)
    if bad.any() and (bad := bad & torch.isfinite(patch.originals)).any():
        raise AdapterError(
            f"{int(bad.sum())} of {new.numel()} entries would not be finite in "
            f"{str(new.dtype).removeprefix('torch.')}, the first of them {new[bad][0].item()}"
        )
    return patch
