# SPDX-License-Identifier: Apache-2.0
"""From adapters to what they write into each weight: alone, at a scale, and together.

All that costs more than writing is done here, beforehand: positions become places in memory,
originals are read, replacement values are made and rounded once. Each step costs O(k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import Verdict, accept, accumulation_dtype, judge, replacement
from shira.delta import SparseDelta
from shira.errors import AdapterError
from shira.ops.memory import memory_of, offsets_of
from shira.ops.patch import Patch, base_at, same_bits
from shira.support import align_indices, index_dtype
from shira.switch.targets import Target
from shira.switch.weights import P


class Entry(NamedTuple):
    """One adapter on one weight."""

    values: Tensor | None
    """``(k,)`` deltas in the order of the patch, on the weight's device; None if the patch is of
    every entry, by a whole tensor, which has no scale and is summed with nothing."""
    patch: Patch
    """At scale 1."""


class Prepared:
    """An adapter whose parameters have been found in a module.

    Args:
        name: What it is called.
        adapter: The adapter; kept.
        names: What the adapter calls each weight.
        check_base: Whether the base's fingerprint must agree.

    Attributes:
        entries: By weight, ready to be written; one that is missing is made by `complete`.
    """

    def __init__(
        self, name: str, adapter: Adapter, names: Mapping[Target, str], check_base: bool
    ) -> None:
        self.name, self.adapter, self.names, self.check_base = name, adapter, names, check_base
        self.entries: dict[Target, Entry] = {}

    def complete(self, active: Mapping[Target, Patch]) -> None:
        """Make the entries that are missing.

        Args:
            active: What is in the weights now.

        Raises:
            WrongBaseError: If a weight is not the one that the adapter was trained on.
            AdapterError: If a replacement value would not be finite.
        """
        made: dict[Target, Entry] = {}
        verdicts: dict[str, Verdict] = {}
        metadata, where = self.adapter.metadata, f"adapter {self.name!r}"
        for target, name in self.names.items():
            if target in self.entries:
                continue
            change = self.adapter[name] if name in self.adapter else self.adapter.tensors[name]
            try:
                made[target], base = make_entry(change, target.weight, active.get(target))
            except AdapterError as error:
                raise AdapterError(f"{where}, parameter {target.name!r}: {error}") from None
            if self.check_base and isinstance(change, SparseDelta):
                verdicts[name] = judge(metadata, name, change.values, base)
        accept(metadata, verdicts, where, "load(..., check_base=False)")
        self.entries.update(made)


def check_together(members: Sequence[tuple[Prepared, float]]) -> None:
    """Refuse adapters with whole tensors that cannot be active with these scales or together.

    Args:
        members: Complete, each with its scale.

    Raises:
        AdapterError: If one with whole tensors has another scale than 1, or another of them changes
            a weight to something else than what one replaces it by.
    """
    for prepared, scale in members:
        prepared.adapter.require_scale_one(f"adapter {prepared.name!r}", scale)
        for target, own in prepared.entries.items():
            for other, _ in members if own.values is None else ():
                entry = other.entries.get(target, own)
                if entry is not own and (
                    entry.values is not None
                    or not same_bits(entry.patch.replacement, own.patch.replacement)
                ):
                    raise AdapterError(
                        f"adapters {prepared.name!r} and {other.name!r} cannot be active together: "
                        f"the first replaces the whole of {target.name!r}, and the second changes "
                        "it to something else"
                    )


def make_entry(
    change: SparseDelta | Tensor, weight: Tensor, active: Patch | None
) -> tuple[Entry, Tensor]:
    """Return an adapter's entry on a weight, and the originals in the order of its support.

    Args:
        change: A delta on a support of the weight's shape, or a whole tensor of that shape, which
            is rounded once to the weight's dtype and costs what the weight has entries.
        weight: The weight or buffer, perhaps with another adapter in it.
        active: What is in it now.

    Raises:
        AdapterError: If a finite original becomes infinite or NaN.
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


def combined(label: str, members: Sequence[tuple[Mapping[P, Entry], float]]) -> dict[P, Patch]:
    """Return the patches of several adapters: deltas are summed, and rounded once.

    Args:
        label: What to call the combination in errors.
        members: The entries of each, by weight, and its scale. Sums are made in this order, in
            float32 (float64 if the weight or one of the deltas is). If one entry of a weight is a
            whole tensor's, all of its are the same.

    Raises:
        AdapterError: If a finite original becomes infinite or NaN.
    """
    plan = {}
    for place in dict.fromkeys(place for entries, _ in members for place in entries):
        here = [(entries[place], scale) for entries, scale in members if place in entries]
        try:
            plan[place] = _summed(here)
        except AdapterError as error:
            raise AdapterError(f"{label}, parameter {place.name!r}: {error}") from None
    return plan


def _summed(entries: Sequence[tuple[Entry, float]]) -> Patch:
    (first, scale), *others = entries
    if first.values is None or (scale == 1.0 and not others):
        return first.patch
    offsets, originals = first.patch.offsets, first.patch.originals
    deltas = [(e.values, e.patch, scale) for e, scale in entries if e.values is not None]
    wide = accumulation_dtype(originals.dtype, *(values.dtype for values, _, _ in deltas))
    if not others:
        return make_patch(offsets, originals, first.values.to(wide) * scale)
    offsets, places = align_indices([patch.offsets for _, patch, _ in deltas])
    originals = originals.new_empty(offsets.numel())
    total = torch.zeros(offsets.numel(), dtype=wide, device=originals.device)
    for (values, patch, scale), at in zip(deltas, places, strict=True):
        originals.index_copy_(0, at, patch.originals)
        total.index_add_(0, at, values.to(wide) * scale)
    return make_patch(offsets, originals, total)


def make_patch(offsets: Tensor, originals: Tensor, delta: Tensor) -> Patch:
    """Return the patch of a delta.

    Args:
        offsets: ``(k,)`` as in `Patch`.
        originals: ``(k,)`` as in `Patch`.
        delta: ``(k,)`` what is added, floating point.

    Raises:
        AdapterError: If a finite original becomes infinite or NaN.
    """
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
