# SPDX-License-Identifier: Apache-2.0
"""An adapter on a module: its deltas by the weights they are for, and its patches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import Verdict, accept, judge
from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError, TargetError
from shira.ops.patch import Patch
from shira.switch.plan import Entry, make_entry, make_whole_entry
from shira.switch.targets import Target, Targets, check_writable


class Loaded:
    """An adapter whose parameters have been found in a module.

    Attributes:
        adapter: As it was given.
        names: What the adapter calls each weight.
        deltas: By weight.
        whole: Whole tensors, by the weight or buffer that they replace.
        entries: By weight, ready to be written; one that is missing is made by `complete`.
        check_base: Whether the base's fingerprint must agree.
    """

    def __init__(
        self, name: str, adapter: Adapter, names: Mapping[Target, str], check_base: bool
    ) -> None:
        self.name = name
        self.adapter = adapter
        self.names = names
        self.deltas = {t: adapter[name] for t, name in names.items() if name in adapter}
        self.whole = {
            t: adapter.tensors[name] for t, name in names.items() if name in adapter.tensors
        }
        self.check_base = check_base
        self.entries: dict[Target, Entry] = {}

    def complete(self, active: Mapping[Target, Patch]) -> None:
        """Make the entries that are missing; ``active`` is what is in the weights now.

        Raises:
            WrongBaseError: If a weight is not the one that the adapter was trained on.
            AdapterError: If a replacement value would not be finite.
        """
        made: dict[Target, Entry] = {}
        verdicts: dict[str, Verdict] = {}
        for target, delta in self.deltas.items():
            if target in self.entries:
                continue
            with self._blaming(target):
                made[target], originals = make_entry(delta, target.weight, active.get(target))
            if self.check_base:
                name, metadata = self.names[target], self.adapter.metadata
                verdicts[name] = judge(metadata, name, delta.values, originals)
        where = f"adapter {self.name!r}"
        accept(self.adapter.metadata, verdicts, where, "load(..., check_base=False)")
        for target, tensor in self.whole.items():
            if target not in self.entries:
                with self._blaming(target):
                    made[target] = make_whole_entry(tensor, target.weight, active.get(target))
        self.entries.update(made)

    @contextmanager
    def _blaming(self, target: Target) -> Iterator[None]:
        """Name this adapter and parameter in errors of the body."""
        try:
            yield
        except AdapterError as error:
            raise AdapterError(
                f"adapter {self.name!r}, parameter {target.name!r}: {error}"
            ) from None


def check_together(members: Sequence[tuple[Loaded, float]]) -> None:
    """Refuse adapters with whole tensors that cannot be active with these scales or together.

    Args:
        members: Complete, each with its scale.

    Raises:
        AdapterError: If one with whole tensors has another scale than 1, or what one replaces as a
            whole is changed otherwise by another.
    """
    for loaded, scale in members:
        loaded.adapter.require_scale_one(f"adapter {loaded.name!r}", scale)
        for target in loaded.whole:
            own = loaded.entries[target]
            for other, _ in members:
                entry = other.entries.get(target, own)
                if entry.values is not None or not _same_bits(entry, own):
                    raise AdapterError(
                        f"adapters {loaded.name!r} and {other.name!r} cannot be active together: "
                        f"the first replaces the whole of {target.name!r}, and the second changes "
                        "it to something else"
                    )


def _same_bits(a: Entry, b: Entry) -> bool:
    new, other = a.patch.replacement, b.patch.replacement
    return new is other or torch.equal(new.view(torch.uint8), other.view(torch.uint8))


def resolve(
    name: str, adapter: Adapter, index: Targets, known: Mapping[str, Target], allow_tied: bool
) -> dict[Target, str]:
    """Find the module's weights that an adapter's parameters are for; each can be written to.

    Args:
        name: The adapter's name, for messages.
        adapter: What to look up.
        index: The module's parameters.
        known: Weights that adapters are loaded for already, by name.
        allow_tied: Accept a weight that is known under further names.

    Raises:
        AdapterError: If a parameter is absent, or two changes are for the same memory.
        WrongBaseError: If a weight has another shape.
        TargetError: If a weight cannot be written to, or is tied and ``allow_tied`` is not set.
    """
    names: dict[Target, str] = {}
    changes: dict[str, SparseDelta | Tensor] = {**adapter, **adapter.tensors}
    for parameter, change in changes.items():
        same = {parameter}  # names that get the very same tensor
        try:
            if isinstance(change, SparseDelta):
                target = index.find(parameter)
                check_writable(target, change.support.shape)
            else:
                target = index.find(parameter, buffers=True)
                check_writable(target, tuple(change.shape), change.dtype)
                tensors = adapter.tensors.items()
                same = {other for other, tensor in tensors if same_tensor(tensor, change)}
            target = _of_memory(target, index, same, allow_tied)
        except (AdapterError, TargetError) as error:
            raise type(error)(f"adapter {name!r}: {error}") from None
        there = known.get(target.name, target)
        if there.weight is not target.weight:
            raise AdapterError(
                f"adapter {name!r}: {parameter!r} is in another module than when adapters were "
                "loaded for it before; make a new Switch"
            )
        target = there
        if target in names and names[target] not in same:
            raise AdapterError(
                f"adapter {name!r} has two changes for one weight, which is tied: {parameter!r} "
                f"and {names[target]!r} are the same memory; remove one of the two"
            )
        names[target] = parameter
    return names


def _of_memory(target: Target, index: Targets, same: Collection[str], allow_tied: bool) -> Target:
    """Return the target that stands for a weight's memory: its own, or of tied ones the first.

    Names in ``same`` get the same change, so that it is no matter that they share memory.
    """
    sharers = index.sharers(target)
    if not sharers:
        return target
    if not allow_tied and not set(sharers) <= set(same):
        raise TargetError(
            f"{target.name!r} shares its memory with {', '.join(map(repr, sharers))} (tied "
            "weights), which the adapter would change too. To allow it: "
            "load(..., allow_tied=True)"
        )
    tied = index.tied(target)
    apart = sorted({*sharers} - {other.name for other in tied})
    if apart:
        raise TargetError(
            f"{target.name!r} shares a part of its memory with {', '.join(map(repr, apart))}, of "
            "another shape or layout; put a copy in the place of one of them"
        )
    return tied[0]
