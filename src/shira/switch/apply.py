# SPDX-License-Identifier: Apache-2.0
"""From one plan to another over all weights: everything, or nothing."""

from __future__ import annotations

from collections.abc import Mapping

from shira.ops.patch import ChangedEntryError, Exchange, Patch
from shira.switch.targets import Target

Plan = Mapping[Target, Patch]
"""What is in each weight; a weight that is not there is the base's."""

Exchanges = dict[Target, Exchange]
"""From one plan to another, weight by weight."""


class ChangedWeightError(ChangedEntryError):
    """A `ChangedEntryError` that knows the weight."""

    def __init__(self, target: Target, error: ChangedEntryError) -> None:
        super().__init__(error.exchange, error.offset)
        self.target = target


def exchanges_between(before: Plan, after: Plan, *, check: bool = True) -> Exchanges:
    """Return the exchanges that lead from one plan to another; nothing is written.

    Args:
        before: What is in the weights.
        after: What is to be in them.
        check: Compare each entry before it is overwritten.
    """
    return {
        target: Exchange(target.weight, before.get(target), after.get(target), check=check)
        for target in {**before, **after}
    }


def exchange_all(exchanges: Exchanges) -> None:
    """Go from one plan to another, in place; if this raises, `roll_back` leads back.

    Raises:
        ChangedWeightError: If somebody else has changed an entry that would be overwritten.
    """
    for target, exchange in exchanges.items():
        try:
            exchange.run()
        except ChangedEntryError as error:
            raise ChangedWeightError(target, error) from None


def roll_back(exchanges: Exchanges) -> None:
    """Put back what has been exchanged, however far that has come; may be called again."""
    for exchange in reversed(exchanges.values()):
        exchange.roll_back()
