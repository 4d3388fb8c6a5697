# SPDX-License-Identifier: Apache-2.0
"""`PatchedWeights`: the adapters in a set of weights, and the way to others: all weights or none.

`shira.Switch` has one for a module, each worker of a serving engine one for its part of a model::

    base --exchange--> adapters --exchange--> other adapters --exchange--> base
               | an error or an interrupt             | forget: what the weights
               v                                      v hold now is the base
         the state before                           base

What is in each weight is a `Patch`, which knows what was there before; `shira.switch.entries` makes
it beforehand, `shira.ops.patch` writes it, and notices where somebody else has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from shira.errors import SwitchError
from shira.ops.memory import WriteCount, count_write, index_of, take_back
from shira.ops.patch import ChangedEntryError, Exchange, Exchanges, Patch

Scales = tuple[tuple[str, float], ...]
"""Names of adapters, each with its scale, in the order in which they are summed."""


class Place(Protocol):
    """The place of a weight, to be hashed by; its tensor may be cast, moved or replaced."""

    @property
    def name(self) -> str:
        """The model's name of the weight."""

    @property
    def weight(self) -> Tensor:
        """The tensor that is there now."""


P = TypeVar("P", bound=Place)

Plan = Mapping[P, Patch]
"""The patch in each weight; one that is not there holds the base."""


class ChangedWeightError(ChangedEntryError):
    """A `ChangedEntryError` that names the ``entry`` by its index and the weight's name."""

    def __init__(self, error: ChangedEntryError, places: Iterable[Place]) -> None:
        super().__init__(error.exchange, error.offset)
        weight = error.exchange.weight
        name = next(place.name for place in places if place.weight is weight)
        self.entry = f"entry {index_of(weight, error.offset)} of {name!r}"


@dataclass(frozen=True)
class State(Generic[P]):
    """The adapters in the weights; replaced as a whole, so that it is never half changed."""

    active: Scales = ()
    plan: Plan[P] = field(default_factory=dict)  # never written to


class Layout(NamedTuple):
    """The properties of a weight that a patch depends on, beside the values."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def layout_of(weight: Tensor) -> Layout:
    """Return the layout that a weight has now."""
    return Layout(weight.dtype, weight.device, tuple(weight.shape), weight.stride())


class PatchedWeights(Generic[P]):
    """Some weights, and the ``state``: the adapters that are in them."""

    def __init__(self) -> None:
        self.state: State[P] = State()
        self._layouts: dict[P, Layout] = {}
        self._counts: dict[P, WriteCount] = {}
        self._unfinished: tuple[Exchanges, State[P], State[P]] | None = None  # before, after

    @property
    def unfinished(self) -> bool:
        """True if an exchange was interrupted and is not undone yet; `settle` undoes it."""
        return self._unfinished is not None

    def exchange(
        self,
        after: State[P],
        *,
        check: bool = True,
        together: Callable[[Callable[[], None]], object] = lambda write: write(),
    ) -> None:
        """Go to another state, in place; after an error or an interrupt all is as it was.

        With ``check`` each entry is compared before it is overwritten, and a `ChangedWeightError`
        raised if somebody else has changed it. ``together`` calls its argument, which writes. What
        it raises, for other processes that could not write their parts, undoes the exchange too.
        """
        before = self.state
        exchanges = self._exchanges(after.plan, check)

        def write() -> None:
            exchanges.run()
            self.state = after
            self._count_writes(before.plan, after.plan)

        try:
            self._unfinished = exchanges, before, after
            together(write)
            self._unfinished = None
        except BaseException as error:
            self._unfinished = exchanges, before, after
            self.settle()
            if isinstance(error, ChangedEntryError):
                raise ChangedWeightError(error, [*before.plan, *after.plan]) from None
            raise

    def settle(self) -> None:
        """Put back what an exchange that was interrupted has left, its exception path too."""
        if self._unfinished is not None:
            exchanges, before, after = self._unfinished
            exchanges.roll_back()
            self.state = before
            _note(after.plan, before.plan)
            self._unfinished = None

    def compare(self, after: Plan[P]) -> None:
        """Compare each entry that an exchange would overwrite, as it does; nothing is written."""
        try:
            self._exchanges(after, check=True).compare()
        except ChangedEntryError as error:
            raise ChangedWeightError(error, [*self.state.plan, *after]) from None

    def forget(self) -> None:
        """Take what the weights hold now for the base; nothing is written."""
        _note(self.state.plan, {})
        self.state, self._unfinished = State(), None
        self._counts.clear()

    def _exchanges(self, after: Plan[P], check: bool) -> Exchanges:
        before = self.state.plan
        return Exchanges(
            Exchange(place.weight, before.get(place), after.get(place), check=check)
            for place in {**before, **after}
        )

    def _count_writes(self, before: Plan[P], after: Plan[P]) -> None:
        for place in after:
            self._counts[place] = count_write(place.weight, self._counts.get(place))
        for place in before:
            if place not in after and place in self._counts:
                take_back(place.weight, self._counts.pop(place))
        _note(before, after)

    def remember(self, places: Iterable[P]) -> None:
        """Note how these weights, and no others, are laid out, for `follow`.

        Of one that is known already the note stays: it may have been cast since.
        """
        known = self._layouts
        self._layouts = {place: known.get(place) or layout_of(place.weight) for place in places}

    def follow(self, forget: Callable[[P], None]) -> None:
        """Follow weights that were cast or moved to another device since `remember`.

        A cast works on each entry by itself, so the originals and replacement values of a patch,
        cast alike, are what the cast weight needs: taking the adapter out gives the base, cast.
        ``forget`` is called with each of them and drops what was made for the weight as it was.
        """
        moved = [p for p, layout in self._layouts.items() if layout_of(p.weight) != layout]
        if not moved:
            return
        plan = dict(self.state.plan)
        for place in moved:
            before, now = self._layouts[place], layout_of(place.weight)
            _check_follows(place, before, now, place in plan)
            if place in plan:
                patch = plan[place]
                plan[place] = Patch(
                    patch.offsets.to(now.device),
                    patch.originals.to(now.device, now.dtype),
                    patch.replacement.to(now.device, now.dtype),
                )
        self.state = State(self.state.active, plan)
        for place in moved:
            forget(place)
        # Last: until then it can all be done again.
        self._layouts.update({place: layout_of(place.weight) for place in moved})


def _check_follows(place: Place, before: Layout, now: Layout, patched: bool) -> None:
    if place.weight.is_meta or now.dtype.is_floating_point != before.dtype.is_floating_point:
        raise SwitchError(f"{place.name!r} is {now.dtype} on {now.device} now: no values to switch")
    if now.shape != before.shape:
        raise SwitchError(
            f"{place.name!r} has shape {now.shape} now, not {before.shape} as when it was loaded; "
            "make a new Switch"
        )
    if patched and now.stride != before.stride:
        raise SwitchError(
            f"{place.name!r} was laid out anew in memory (strides {now.stride}, before "
            f"{before.stride}) with an adapter in it; deactivate before, or rebase() to take it as "
            "it is for the base"
        )


def _note(before: Iterable[Place], after: Mapping[P, Patch]) -> None:
    """Leave what is in each weight with the weight, for who needs to know the base's values."""
    for place in {*before, *after}:
        place.weight.shira_patch = after.get(place)  # type: ignore[attr-defined, call-overload]
