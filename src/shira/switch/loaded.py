# SPDX-License-Identifier: Apache-2.0
"""An adapter on a module: its deltas by the weights they are for, and its patches."""

from __future__ import annotations

from collections.abc import Mapping

from shira.base import fingerprint
from shira.delta import Adapter, SparseDelta
from shira.errors import AdapterError, TargetError, WrongBaseError
from shira.ops.patch import Patch
from shira.store.peft_config import FINGERPRINT_FIELD
from shira.switch.plan import Entry, make_entry
from shira.switch.targets import Target, Targets, check_writable


class Loaded:
    """An adapter whose parameters have been found in a module.

    Attributes:
        adapter: As it was given.
        deltas: By weight.
        entries: By weight, ready to be written; one that is missing is made by `complete`.
        check_base: Whether the base's fingerprint must agree.
    """

    def __init__(
        self, name: str, adapter: Adapter, deltas: Mapping[Target, SparseDelta], check_base: bool
    ) -> None:
        self.name = name
        self.adapter = adapter
        self.deltas = deltas
        self.check_base = check_base
        self.entries: dict[Target, Entry] = {}

    def complete(self, active: Mapping[Target, Patch]) -> None:
        """Make the entries that are missing; ``active`` is what is in the weights now.

        Raises:
            WrongBaseError: If a weight is not the one that the adapter was trained on.
            AdapterError: If a replacement value would not be finite.
        """
        made = {
            target: self._entry(target, delta, active.get(target))
            for target, delta in self.deltas.items()
            if target not in self.entries
        }
        self.entries.update(made)

    def _entry(self, target: Target, delta: SparseDelta, active: Patch | None) -> Entry:
        try:
            entry, originals = make_entry(delta, target.weight, active)
        except AdapterError as error:
            raise AdapterError(
                f"adapter {self.name!r}, parameter {target.name!r}: {error}"
            ) from None
        recorded = self.adapter.metadata.get(FINGERPRINT_FIELD)
        # An untrained adapter changes nothing, so it fits every base.
        if self.check_base and isinstance(recorded, Mapping) and delta.values.any():
            self._check_fingerprint(target, fingerprint(originals), recorded.get(target.name))
        return entry

    def _check_fingerprint(self, target: Target, found: str, recorded: str | None) -> None:
        # A base of another dtype rounds differently, so its hash says nothing.
        if recorded is None or found == recorded or found.split(":")[0] != recorded.split(":")[0]:
            return
        raise WrongBaseError(
            f"adapter {self.name!r}: wrong base: the model's {target.name!r} does not hold the "
            f"values that the adapter was trained on (fingerprint {found}, recorded {recorded}); "
            f"it was trained on {self.adapter.metadata.get('base_model_name_or_path')!r}. To use "
            "it all the same: load(..., check_base=False)"
        )


def resolve(
    name: str, adapter: Adapter, index: Targets, known: Mapping[str, Target], allow_tied: bool
) -> dict[Target, SparseDelta]:
    """An adapter's deltas by the module's weights; each is checked to fit and to be writable.

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
    deltas: dict[Target, SparseDelta] = {}
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
        if target in deltas:
            raise AdapterError(
                f"adapter {name!r} has two deltas for one weight, which is tied: {parameter!r} "
                f"and {target.name!r} are the same memory; which of them is meant? Remove one"
            )
        deltas[target] = delta
    return deltas


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
