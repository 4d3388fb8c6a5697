# SPDX-License-Identifier: Apache-2.0
"""`PatchedWeights`: the adapters in a set of weights, and the way to others: all weights or none.

`shira.Switch` has one for a module, each worker of a serving engine one for its part of a model::

    base --exchange--> adapters --exchange--> other adapters --exchange--> base
               | an error or an interrupt             | forget: what the weights
               v                                      v hold now is the base
         the state before                           base

What is in each weight is a `Patch`, which knows what was there before. `make_entry` and `combined`
make it beforehand, and do all that costs more than writing: positions become places in memory,
originals are read, replacement values are made and rounded once. `shira.ops.patch` writes it, and
notices where somebody else has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from shira.base import accumulation_dtype, replacement
from shira.delta import SparseDelta
from shira.errors import AdapterError, SwitchError
from shira.ops.memory import WriteCount, count_write, index_of, memory_of, offsets_of, take_back
from shira.ops.patch import ChangedEntryError, Exchange, Exchanges, Patch, base_at, same_bits
from shira.support import align_indices, index_dtype

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
        """Note how these weights, and no others, are laid out, for `follow`."""
        known = self._layouts  # may have been cast since
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

    What is ``active`` in the weight is seen through. `AdapterError` if a finite one stays not so.
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
        whole = [(name, entry.patch) for name, entry, _ in here if entry.values is None]
        if whole:
            first, plan[place] = whole[0]
            new = plan[place].replacement
            for name, (values, patch), _ in here:
                if values is not None or not same_bits(patch.replacement, new):
                    raise AdapterError(
                        f"adapters {first!r} and {name!r} cannot be active together: the first "
                        f"replaces the whole of {place.name!r}, and the second changes it to "
                        "something else"
                    )
            continue
        try:
            plan[place] = _summed(
                [(e.values, e.patch, scale) for _, e, scale in here if e.values is not None]
            )
        except AdapterError as error:
            scales = {name: scale for name, scale, _ in members}
            raise AdapterError(f"{scales}, parameter {place.name!r}: {error}") from None
    return plan


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
