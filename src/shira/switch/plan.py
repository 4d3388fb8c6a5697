# SPDX-License-Identifier: Apache-2.0
"""From deltas to patches: for one adapter, at a scale, and for several together.

All that costs more than writing is done here, beforehand: positions become places in memory,
originals are read, replacement values are made and rounded once. Pure functions; each costs O(k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shira.base import accumulation_dtype, replacement
from shira.delta import SparseDelta
from shira.errors import AdapterError
from shira.ops.memory import memory_of, offsets_of
from shira.ops.patch import Patch, base_at
from shira.support import align_indices, index_dtype


class Entry(NamedTuple):
    """One adapter on one weight."""

    values: Tensor | None
    """``(k,)`` deltas in the order of the patch, on the weight's device; None if the patch is of
    every entry, by a whole tensor, which has no scale and is summed with nothing."""
    patch: Patch
    """At scale 1."""


def make_entry(delta: SparseDelta, weight: Tensor, active: Patch | None) -> tuple[Entry, Tensor]:
    """An adapter's entry on a weight, and the originals in the order of the delta's support.

    Args:
        delta: On a support of the weight's shape.
        weight: The weight, perhaps with another adapter in it.
        active: What is in it now.

    Raises:
        AdapterError: If a finite original becomes infinite or NaN.
    """
    flat = delta.support.indices.to(weight.device).contiguous()
    offsets = offsets_of(flat, weight.shape, weight.stride())
    values = delta.values.detach().to(weight.device)
    if offsets is flat:
        originals = flat_originals = base_at(weight, offsets, active)
    else:
        offsets, order = offsets.sort()
        values = values[order]
        originals = base_at(weight, offsets, active)
        flat_originals = torch.empty_like(originals)
        flat_originals[order] = originals
        offsets = offsets.to(index_dtype(memory_of(weight.data).numel()))
    patch = make_patch(offsets, originals, replacement(originals, values))
    return Entry(values, patch), flat_originals


def make_whole_entry(tensor: Tensor, weight: Tensor, active: Patch | None) -> Entry:
    """Make a whole tensor's entry on a weight, rounded once to the weight's dtype.

    Costs what the weight has entries, all of which it changes.

    Args:
        tensor: Of the weight's shape.
        weight: The weight or buffer, perhaps with another adapter in it.
        active: What is in it now.

    Raises:
        AdapterError: If a finite original becomes infinite.
    """
    flat = torch.arange(weight.numel(), dtype=index_dtype(weight.numel()), device=weight.device)
    offsets = offsets_of(flat, weight.shape, weight.stride())
    new = tensor.detach().to(weight.device, weight.dtype, copy=True).reshape(-1)
    if offsets is not flat:
        offsets, order = offsets.sort()
        new = new[order]
        offsets = offsets.to(index_dtype(memory_of(weight.data).numel()))
    return Entry(None, make_patch(offsets, base_at(weight, offsets, active), new.contiguous()))


def scaled(entry: Entry, scale: float) -> Patch:
    """The patch of one adapter, its deltas multiplied by a factor."""
    if scale == 1.0 or entry.values is None:
        return entry.patch
    offsets, originals = entry.patch.offsets, entry.patch.originals
    wide = accumulation_dtype(originals.dtype, entry.values.dtype)
    return make_patch(offsets, originals, replacement(originals, entry.values.to(wide) * scale))


def combined(entries: Sequence[tuple[Entry, float]]) -> Patch:
    """The patch of several adapters on one weight: deltas are summed, and rounded once.

    Args:
        entries: Each with its scale. The sum is made in their order, in float32 (float64 if the
            weight or one of the deltas is). If one is a whole tensor's, all are the same.
    """
    if len(entries) == 1 or entries[0][0].values is None:
        return scaled(*entries[0])
    patches = [entry.patch for entry, _ in entries]
    offsets, places = align_indices([patch.offsets for patch in patches])
    originals = patches[0].originals.new_empty(offsets.numel())
    deltas = [(e.values, e.patch, scale) for e, scale in entries if e.values is not None]
    dtypes = [values.dtype for values, _, _ in deltas]
    total = torch.zeros(
        offsets.numel(),
        dtype=accumulation_dtype(originals.dtype, *dtypes),
        device=originals.device,
    )
    for (values, patch, scale), at in zip(deltas, places, strict=True):
        originals[at] = patch.originals
        total[at] += values.to(total.dtype) * scale
    return make_patch(offsets, originals, replacement(originals, total))


def make_patch(offsets: Tensor, originals: Tensor, new: Tensor) -> Patch:
    """A patch of values that are finite where the originals are; else an `AdapterError`."""
    bad = ~torch.isfinite(new)
    if bad.any() and (bad := bad & torch.isfinite(originals)).any():
        raise AdapterError(
            f"{int(bad.sum())} of {new.numel()} entries would not be finite in "
            f"{str(new.dtype).removeprefix('torch.')}, the first of them {new[bad][0].item()}"
        )
    return Patch(offsets, originals, new)
