# SPDX-License-Identifier: Apache-2.0
"""An adapter on a module: its deltas by the weights they are for, and its patches."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from shira.base import Verdict, accept, judge
from shira.delta import Adapter, SparseDelta
from shira.errors import AdapterError, TargetError
from shira.ops.patch import Patch
from shira.switch.plan import Entry, make_entry
from shira.switch.targets import Target, Targets, check_writable


class Loaded:
    """An adapter whose parameters have been found in a module.

    Attributes:
        adapter: As it was given.
        names: What the adapter calls each weight.
        deltas: By weight.
        entries: By weight, ready to be written; one that is missing is made by `complete`.
        check_base: Whether the base's fingerprint must agree.
    """

    def __init__(
        self, name: str, adapter: Adapter, names: Mapping[Target, str], check_base: bool
    ) -> None:
        self.name = name
        self.adapter = adapter
        self.names = names
        self.deltas = {target: adapter[name] for target, name in names.items()}
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
            made[target], originals = self._entry(target, delta, active.get(target))
            if self.check_base:
                name, metadata = self.names[target], self.adapter.metadata
                verdicts[name] = judge(metadata, name, delta.values, originals)
        where = f"adapter {self.name!r}"
        accept(self.adapter.metadata, verdicts, where, "load(..., check_base=False)")
        self.entries.update(made)

    def _entry(
        self, target: Target, delta: SparseDelta, active: Patch | None
    ) -> tuple[Entry, Tensor]:
        try:
            return make_entry(delta, target.weight, active)
        except AdapterError as error:
            raise AdapterError(
                f"adapter {self.name!r}, parameter {target.name!r}: {error}"
            ) from None


def resolve(
    name: str, adapter: Adapter, index: Targets, known: Mapping[str, Target], allow_tied: bool
) -> dict[Target, str]:
    """An adapter's parameter names by the module's weights; each fits and can be written to.

    Args:
        name: The adapter's name, for messages.
        adapter: What to look up.
        index: The module's parameters.
        known: Weights that adapters are loaded for already, by name.
        allow_tied: Accept a weight that is known under further names.

    Raises:
        AdapterError: If a parameter is absent, or two deltas are for the same memory.
        WrongBaseError: If a weight has another shape.
        TargetError: If a weight cannot be written to, or is tied and ``allow_tied`` is not set.
    """
    names: dict[Target, str] = {}
    for parameter, delta in adapter.items():
        try:
            target = index.find(parameter)
            check_writable(target, delta.support.shape)
            target = _of_memory(target, index, allow_tied)
        except (AdapterError, TargetError) as error:
            raise type(error)(f"adapter {name!r}: {error}") from None
        there = known.get(target.name, target)
        if there.weight is not target.weight:
            raise AdapterError(
                f"adapter {name!r}: {parameter!r} is in another module than when adapters were "
                "loaded for it before; make a new Switch"
            )
        target = there
        if target in names:
            raise AdapterError(
                f"adapter {name!r} has two deltas for one weight, which is tied: {parameter!r} "
                f"and {target.name!r} are the same memory; which of them is meant? Remove one"
            )
        names[target] = parameter
    return names


def _of_memory(target: Target, index: Targets, allow_tied: bool) -> Target:
    """The name by which a weight's memory is known: its own, or of tied ones the first."""
    sharers = index.sharers(target)
    if not sharers:
        return target
    if not allow_tied:
        raise TargetError(
            f"{target.name!r} shares its memory with {', '.join(map(repr, sharers))} (tied "
            "weights), which the adapter would change too. If that is meant: "
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
