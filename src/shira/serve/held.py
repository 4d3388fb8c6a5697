# SPDX-License-Identifier: Apache-2.0
"""What one rank holds: its adapters, what is active, how to take it back. Knows no engine.

The life of the weights::

    base --activate--> active --activate--> active --deactivate--> base
                         | discard (sleep level 2: the engine drops the weights)
                         v
                     discarded --rebase (the base was loaded anew)--> active

Each method is called on every rank in the same order, and changes all of them or none: prepare and
check everywhere, then write; if a rank fails then, all put back what they had
(``shira.serve.ranks``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.delta import checked_scale
from shira.errors import AdapterError, ServeError, UnknownAdapterError, WrongBaseError, did_you_mean
from shira.ops.patch import Patch, same_bits
from shira.serve.checking import Stored, nothing_stored
from shira.serve.exchange import Change
from shira.serve.loading import Loaded, load
from shira.serve.messages import named
from shira.serve.placement import Loads, Placement, held_by, storage_key, trace, whole_storage
from shira.serve.ranks import Alone, Ranks, agree
from shira.switch.plan import Entry, combined

_CHUNK = 2**24  # entries hashed at a time


class Held:
    """One rank's adapters.

    Args:
        model: The rank's model, with the loader of its checkpoint.
        dtype: The dtype in which it is served.
        ranks: All ranks that hold a part of the model.
        refuse: Called with a name and its placements before they are used; raises if the engine
            computes with something else than these weights.
        stored: Values of the checkpoint's weights, of which some are compared in loading.
    """

    def __init__(
        self,
        model: Loads,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        refuse: Callable[[str, tuple[Placement, ...]], None] = lambda name, placements: None,
        stored: Stored = nothing_stored,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.ranks: Ranks = ranks or Alone()
        self.refuse = refuse
        self.stored = stored
        self.adapters: dict[str, Loaded] = {}
        self.active: dict[str, float] = {}
        self.discarded = False
        self.broken = False
        self._patches: dict[int, Patch] = {}  # what is in the weights, by storage
        self._patched: dict[int, Tensor] = {}  # those storages
        self._placements: dict[tuple[str, tuple[int, ...]], tuple[Placement, ...]] = {}

    @property
    def state(self) -> str:
        """A hash of what is active, by content: equal states compute equal answers."""
        if not self.active:
            return "base"
        terms = [(self.adapters[name].digest, scale.hex()) for name, scale in self.active.items()]
        return hashlib.blake2b(repr(terms).encode(), digest_size=16).hexdigest()

    def load(self, name: str, read: Callable[[], Adapter], *, compare: bool = True) -> Loaded:
        """Hold an adapter under a name; nothing served changes. Errors: see `loading.load`.

        Args:
            name: A name that is free.
            read: Reads and validates the adapter.
            compare: Whether to compare some base values with the checkpoint's; False if the
                weights have been trained on since.

        Raises:
            AdapterError: If the name is taken.
            ServeError: If the weights are discarded.
        """
        agree(self.ranks, lambda: self._check_new(name))
        here = self._keys()
        self._placements = {
            asked: found
            for asked, found in self._placements.items()
            if all(placement.key in here for placement in found)
        }
        stored = self.stored if compare else nothing_stored
        loaded = load(read, self._place, self._patches, self.ranks, stored)
        self.adapters[name] = loaded
        return loaded

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: If there is none of this name.
            AdapterError: If it is active.
        """
        agree(self.ranks, lambda: self._check_unused(name))
        del self.adapters[name]

    def activate(self, weights: Mapping[str, float]) -> None:
        """Make these adapters active, each times its scale, and no others.

        Args:
            weights: Scale by name; empty for the base.

        Raises:
            UnknownAdapterError: If one is not loaded.
            AdapterError: If a scale is not finite, or an entry would not be.
            SwitchError: If something else has written to the weights.
            ServeError: If the weights are discarded, or a rank failed to write; nothing has
                changed then.
        """
        wanted, changes = agree(self.ranks, lambda: self._checked_changes(weights))
        self._commit(wanted, changes)

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise what `activate` would raise, and change nothing."""
        agree(self.ranks, lambda: self._checked_changes(weights))

    def discard(self) -> None:
        """The engine is about to drop the weights: what is active will have to be applied anew."""
        self.discarded = True

    def rebase(self, *, check: bool = True) -> None:
        """The base's weights were loaded anew, into the same memory: apply what was active.

        Args:
            check: Whether the new base must have the values of the old one at the entries of the
                loaded adapters. False for a base that was trained on.

        Raises:
            WrongBaseError: If it has not.
            ServeError: If the weights lie in other memory, so that adapters must be loaded again.
        """
        adapters, changes = agree(self.ranks, lambda: self._anew(check))
        wanted = self.active
        self.adapters, self.active, self._patches = adapters, {}, {}
        self.discarded = self.broken = False
        self._commit(wanted, changes)

    def fingerprint(self) -> dict[str, str]:
        """Hashes of all weights on this rank: ``base``, whatever is active, and ``weights`` as is.

        Reads every weight, some at a time: it is the identity of the whole.
        """
        base, now = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for key, storage in self._storages().items():
            patch = self._patches.get(key)
            for start in range(0, storage.numel(), _CHUNK):
                chunk = storage[start : start + _CHUNK].cpu()
                now.update(chunk.view(torch.uint8).numpy().data)
                if patch is not None:
                    here = (patch.offsets >= start) & (patch.offsets < start + chunk.numel())
                    chunk = chunk.clone()  # of a storage on the CPU it is a view
                    at = patch.offsets[here].long().cpu() - start
                    chunk[at] = patch.originals[here].cpu()
                base.update(chunk.view(torch.uint8).numpy().data)
        return {"base": base.hexdigest(), "weights": now.hexdigest()}

    # --- preparing: reads and computes, writes nothing ------------------------------------------

    def _checked_changes(
        self, weights: Mapping[str, float]
    ) -> tuple[dict[str, float], list[Change]]:
        self._check_awake()
        for name in weights:
            self._known(name)
        wanted = {name: checked_scale(name, scale) for name, scale in weights.items()}
        self._check_in_place(wanted)
        changes = self._changes(self.adapters, wanted)
        for change in changes:
            change.check()
        return wanted, changes

    def _anew(self, check: bool) -> tuple[dict[str, Loaded], list[Change]]:
        self._check_in_place(self.adapters)
        adapters = {}
        for name, loaded in self.adapters.items():
            parts = {key: part.anew() for key, part in loaded.parts.items()}
            for key, part in parts.items():
                was = loaded.parts[key].entry.patch.originals
                if check and not same_bits(part.entry.patch.originals, was):
                    raise WrongBaseError(
                        f"the weights that were loaded are not those of before, at the entries of "
                        f"adapter {name!r}; rebase(check=False) applies it nevertheless"
                    )
            adapters[name] = loaded._replace(parts=parts)
        changes = self._changes(adapters, self.active)
        return adapters, [c._replace(before=None) for c in changes if c.after is not None]

    def _changes(self, adapters: Mapping[str, Loaded], wanted: Mapping[str, float]) -> list[Change]:
        entries: dict[int, list[tuple[Entry, float]]] = {key: [] for key in self._patches}
        storages = dict(self._patched)
        for name, scale in wanted.items():
            for key, part in adapters[name].parts.items():
                entries.setdefault(key, []).append((part.entry, scale))
                storages[key] = part.storage
        return [
            Change(storages[key], self._patches.get(key), combined(each) if each else None)
            for key, each in entries.items()
        ]

    # --- writing --------------------------------------------------------------------------------

    def _commit(self, wanted: Mapping[str, float], changes: list[Change]) -> None:
        written: list[Change] = []
        before = {name: self.__dict__[name] for name in ("active", "_patched", "_patches")}

        def write() -> None:
            for change in changes:
                written.append(change)  # before it: a write may be interrupted
                change.apply()
            self.active = dict(wanted)
            self._patched = {storage_key(c.storage): c.storage for c in changes}
            self._patches = {
                storage_key(c.storage): c.after for c in changes if c.after is not None
            }

        try:
            agree(self.ranks, write)
        except BaseException:
            self.broken = True  # until all is back
            for change in reversed(written):
                change.roll_back()
            self.__dict__.update(before)
            self.broken = False
            raise

    # --- what is where --------------------------------------------------------------------------

    def _place(self, name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
        if (name, shape) not in self._placements:
            placements = trace(self.model, name, shape, self.dtype)
            self.refuse(name, placements)
            self._placements[name, shape] = placements
        return self._placements[name, shape]

    def _storages(self) -> dict[int, Tensor]:
        """Every storage of the model once, in the order of its modules."""
        return {
            storage_key(held.tensor): whole_storage(held.tensor) for held in held_by(self.model)
        }

    def _keys(self) -> set[int]:
        return {storage_key(held.tensor) for held in held_by(self.model)}

    # --- checking -------------------------------------------------------------------------------

    def _check_awake(self) -> None:
        if self.broken:
            raise ServeError(
                "the weights could not be put back after a failed switch: restart the engine, or "
                "reload its weights and rebase"
            )
        if self.discarded:
            raise ServeError(
                "the engine's weights are discarded (sleep level 2): wake it up, reload the "
                "weights and rebase"
            )

    def _check_in_place(self, names: Iterable[str]) -> None:
        here = self._keys()
        for name in names:
            if not self.adapters[name].parts.keys() <= here:
                raise ServeError(
                    f"the weights of adapter {name!r} lie in other memory than when it was loaded: "
                    "deactivate, unload and load it again"
                )

    def _check_new(self, name: str) -> None:
        self._check_awake()
        if named(name) in self.adapters:
            raise AdapterError(f"an adapter {name!r} is loaded already: unload it first")

    def _check_unused(self, name: str) -> None:
        self._known(name)
        if name in self.active:
            raise AdapterError(f"adapter {name!r} is active: deactivate it before unloading")

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise UnknownAdapterError(
                f"no adapter {name!r} is loaded.{did_you_mean(name, self.adapters)}"
            )
