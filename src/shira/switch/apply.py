# SPDX-License-Identifier: Apache-2.0
"""From one plan to another over all weights: everything, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from shira.ops.patch import ChangedEntryError, Patch, exchange
from shira.switch.targets import Target

Plan = Mapping[Target, Patch]
"""What is in each weight; a weight that is not there is the base's."""


class ChangedWeightError(ChangedEntryError):
    """A `ChangedEntryError` that knows the weight."""

    def __init__(self, target: Target, offset: int) -> None:
        super().__init__(offset)
        self.target = target


def exchange_all(
    before: Plan, after: Plan, *, check: bool = True, then: Callable[[], None] = lambda: None
) -> None:
    """Go from one plan to another, in place.

    Whatever goes wrong half way, an interrupt included, the weights are as before when this
    raises: an unchecked exchange back does not depend on how far the exchange had come.

    Args:
        before: What is in the weights.
        after: What is to be in them.
        check: Compare each entry before it is overwritten.
        then: Called when all is written; if it raises, everything is put back too.

    Raises:
        ChangedWeightError: If somebody else has changed an entry that would be overwritten.
    """
    begun: list[Target] = []
    try:
        for target in {**before, **after}:
            begun.append(target)
            try:
                exchange(target.weight, before.get(target), after.get(target), check=check)
            except ChangedEntryError as error:
                begun.pop()  # it has changed nothing, and the foreign values are to stay
                raise ChangedWeightError(target, error.offset) from None
        then()
    except BaseException:
        for target in reversed(begun):
            exchange(target.weight, after.get(target), before.get(target), check=False)
        raise


def index_at(weight: Tensor, offset: int) -> tuple[int, ...]:
    """The index of the entry at a place in a weight's memory."""
    index = [0] * weight.dim()
    strides = weight.stride()
    for dim in sorted(range(weight.dim()), key=lambda d: -strides[d]):
        if weight.shape[dim] > 1:
            index[dim], offset = divmod(offset, strides[dim])
    return tuple(index)
