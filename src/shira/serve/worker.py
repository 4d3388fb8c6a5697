# SPDX-License-Identifier: Apache-2.0
"""The adapters of one worker: loaded, active, given new values, taken out. Knows no engine.

The life of the weights::

    base --activate--> active --activate--> active --activate none--> base
                         | sleep
                         v
                       asleep --wake--> active
                         | (at level 2 the engine drops the weights)
                         v
                     discarded --rebase (the base was loaded anew)--> active

Each method is called in every process of the model in the same order, and changes all of them or
none: prepare and check everywhere, then write; if a process fails then, all put back what they had
(`shira.serve.messages.agree`). `shira.switch.weights` has the states, as for `shira.Switch`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.checkpoints.conversion import Part, Place, as_it_is
from shira.checkpoints.entries import read_entries
from shira.errors import (
    AdapterError,
    ServeError,
    ShiraError,
    SwitchError,
    WrongBaseError,
)
from shira.ops.patch import Exchange, Exchanges, same_bits
from shira.serve.beside import Beside
from shira.serve.holding import Holding, Source
from shira.serve.loading import (
    LoadedAdapter,
    Piece,
    StoredValues,
    entry_at,
    load,
    load_again,
    nbytes_of,
)
from shira.serve.messages import Processes, Weights, agree, gather, named, slept, state_of, wanted
from shira.serve.placement import Model, Placement, Storage, storage_keys, storages_of, trace
from shira.store.header import FLOATS
from shira.support import Support
from shira.switch.weights import (
    ChangedWeightError,
    PatchedWeights,
    Plan,
    State,
    combined,
)

Writing: TypeAlias = Callable[
    [Collection[Storage], Callable[[], Collection[Storage]]], AbstractContextManager[None]
]

_CHUNK = 2**24  # entries hashed at a time


def by_places(places: Mapping[str, Place], *, compare: bool = True) -> dict[str, Any]:
    """Return the arguments ``stored`` and ``split`` of `WorkerAdapters` for places in a checkpoint.

    Parameters without a place go by their own names. Without ``compare`` no values are read.
    """

    def stored(name: str, indices: Tensor) -> Tensor | None:
        if not compare or name not in places or places[name].dtype not in FLOATS:
            return None
        flat, order = indices.cpu().sort()
        return read_entries(places[name], flat)[order.argsort()]

    def split(name: str, support: Support) -> list[Part]:
        return (places.get(name) or as_it_is(name, support.shape)).split(support.indices.cpu())

    return {"stored": stored, "split": split}


class WorkerAdapters:
    """The adapters of one worker process.

    Args:
        model: The process's part of the model, with the loader of its checkpoint.
        dtype: Of the served weights.
        processes: All that hold a part of the model.
        refuse: Called with a name and its placements before they are used; raises if the engine
            computes with something else than these weights.
        stored: Values of a parameter in the checkpoint, of which some are compared in loading.
        split: Where the checkpoint has the entries of a parameter: in which of its tensors. As a
            rule in the one of that name; experts, for one, lie in a tensor each.
        beside: The same processes, for a thread of each to talk beside the engine's steps; without
            them nothing else may gather between `begin_load` and `end_load`.
        writing: Entered around each write, with the weights that are written to and a function
            that returns those which do not hold the base afterwards.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        processes: Processes | None = None,
        refuse: Callable[[str, tuple[Placement, ...]], None] = lambda name, placements: None,
        stored: StoredValues | None = None,
        split: Callable[[str, Support], list[Part]] | None = None,
        beside: Processes | None = None,
        writing: Writing = lambda touched, changed: nullcontext(),
    ) -> None:
        self.model, self.dtype = model, dtype
        self.processes = processes or Processes()
        self.refuse, self.stored = refuse, stored
        self.split = split or (lambda name, each: as_it_is(name, each.shape).split(each.indices))
        self.beside = beside or self.processes
        self.writing = writing
        self.holding = Holding()
        self.discarded = self.asleep = False
        self._base_changes = 0
        self._switching = threading.RLock()  # held while weights are written, or read in a thread
        self._beside: Beside[Any, Any, LoadedAdapter] | None = None
        self._weights: PatchedWeights[Storage] = PatchedWeights()
        self._placements: dict[tuple[str, tuple[int, ...]], tuple[Placement, ...]] = {}

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters in memory; `require` brings back those that were dropped."""
        return self.holding.in_memory

    @property
    def active(self) -> dict[str, float]:
        """Scale by name of what is in the weights; empty for the base."""
        return dict(self._weights.state.active)

    @property
    def state(self) -> str:
        """A hash of what is active, by content: equal states compute equal answers."""
        return state_of([(self.adapters[name].digest, s) for name, s in self.active.items()])

    def load(
        self,
        name: str,
        read: Callable[[], Adapter],
        *,
        path: str = "its file",
        compare: bool = True,
    ) -> LoadedAdapter:
        """Hold the adapter that is read under a free name; nothing served changes.

        ``read`` is called again, and has to return the same, when the adapter is used after it was
        dropped from memory; ``path`` says in errors what it reads. Without ``compare`` the weights
        need no longer be those of the checkpoint. For errors see `loading.load` and `Holding.add`.
        """

        def read_new() -> Adapter:
            self._check_awake()
            if self.knows(named(name)):
                raise AdapterError(f"an adapter {name!r} is loaded already: unload it first")
            return read()

        self._follow_memory()
        stored = self.stored if compare else None
        loaded = load(read_new, self.locate, self._steady, self.processes, stored)
        self.holding.add(name, loaded, Source(read, path), self.active)
        return loaded

    def begin_load(
        self,
        name: str,
        read: Callable[[], Adapter] | None,
        *,
        path: str = "its file",
        compare: bool = True,
    ) -> None:
        """Begin what `load` does, beside the engine's steps; `end_load` hands it over.

        With None for ``read``, an adapter that was dropped is read again. In between
        `load_ready` is called, from time to time and between steps. One load is under way at a
        time; one that was begun before and not ended is brought to its end and forgotten.
        """
        if self._beside is not None:
            with suppress(Exception):
                self._beside.result()
            self._beside = None

        def check_name() -> None:
            self._check_awake()
            if read is None:
                self.holding.known(name)
            elif self.knows(named(name)):
                raise AdapterError(f"an adapter {name!r} is loaded already: unload it first")

        agree(self.processes, check_name)
        self._follow_memory()
        before = self.holding.known(name) if read is None else None
        source = self.holding.sources[name] if read is None else Source(read, path)
        stored = self.stored if compare else None
        self._beside = self._begun(name, source, before, stored)
        self._to_take = name, source, before, self._base_changes

    def load_ready(self) -> bool:
        """Go on with the load that was begun, for milliseconds; return if `end_load` is due."""
        return self._beside is None or self._beside.step()

    def end_load(self) -> tuple[str, LoadedAdapter]:
        """Hold the adapter whose loading was begun, and return it with its name.

        Errors are those of `load` and `require`.
        """
        if self._beside is None:
            raise ServeError("no load was begun")
        name, source, before, base_changes = self._to_take
        beside, self._beside = self._beside, None
        loaded = beside.result()

        def check_now() -> None:
            self._check_whole()
            if base_changes != self._base_changes:
                raise ServeError(
                    f"the engine's weights were loaded anew while adapter {name!r} was being "
                    "loaded: load it again"
                )
            if before is None and self.knows(name):
                raise AdapterError(f"an adapter {name!r} was loaded meanwhile")

        agree(self.processes, check_now)
        if before is None:
            self.holding.add(name, loaded, source, self.active)
        elif self.holding.on_disk.get(name) is before and name not in self.adapters:
            self.holding.make_room([name], self.active)
            self.holding.bring_back(name, loaded)
        return name, loaded

    def _begun(
        self,
        name: str,
        source: Source,
        before: LoadedAdapter | None,
        stored: StoredValues | None,
    ) -> Beside[tuple[Adapter, dict[str, list[Part]]], tuple[str, tuple[int, ...]], LoadedAdapter]:
        found: dict[tuple[str, tuple[int, ...]], tuple[Placement, ...]] = {}

        def read() -> tuple[Adapter, dict[str, list[Part]]]:
            adapter = source.read()
            return adapter, {name: self.split(name, each.support) for name, each in adapter.items()}

        def find(key: tuple[str, tuple[int, ...]]) -> None:
            found[key] = self._placed(*key)

        def place(get: Callable[[], tuple[Adapter, dict[str, list[Part]]]]) -> LoadedAdapter:
            def locate(name: str, support: Support) -> list[Piece]:
                return _pieces(get()[1][name], lambda *key: found[key])

            def again() -> Adapter:
                return get()[0]

            if before is None:
                return load(again, locate, self._steady, self.beside, stored)
            with self._naming(name, source.path):
                return load_again(before, again, locate, self._steady, self.beside)

        def keys(value: tuple[Adapter, dict[str, list[Part]]]) -> list[tuple[str, tuple[int, ...]]]:
            return [(part[0].key, part[0].shape) for parts in value[1].values() for part in parts]

        return Beside(read, keys, find, place)

    def require(self, name: str, *, beyond: bool = False) -> LoadedAdapter:
        """Return the adapter of a name, in memory; `UnknownAdapterError` if there is none.

        One that was dropped is read again, so that all processes call this in the same order.
        `AdapterError` if its file is not there any more, or not what it was, or if what is in use
        leaves no room for it; `SwitchError` if the base has changed below it. Nothing has changed
        then. Going ``beyond`` the bound it needs no room, and nothing is dropped for it.
        """
        self._bring_back([name], beyond)
        return self.holding.use(name)

    def knows(self, name: str) -> bool:
        """Return whether an adapter of this name is loaded, in memory or not."""
        return name in self.holding

    def limit(self, max_adapter_memory: int | None) -> None:
        """Bound the bytes of this process that adapters take; see `Holding`."""
        agree(self.processes, lambda: self.holding.set_limit(max_adapter_memory, list(self.active)))

    def pin(self, name: str) -> None:
        """Bring an adapter into memory and keep it there until it is unpinned as often."""
        self.require(name)
        self.holding.pin(name)

    def unpin(self, name: str) -> None:
        """Take back one `pin`."""
        self.holding.unpin(name)

    def unload(self, name: str) -> None:
        """Forget an adapter; `AdapterError` if it is active."""

        def check_unused() -> None:
            self.holding.known(named(name))
            if name in self.active:
                raise AdapterError(f"adapter {name!r} is active: deactivate it before unloading")

        agree(self.processes, check_unused)
        self.holding.forget(name)

    def activate(self, weights: Weights, scale: float = 1.0) -> None:
        """Make these adapters active, each times its scale, and no others.

        `AdapterError` if one is unknown or an entry would not be finite, `SwitchError` if something
        else has written to the weights; `ServeError` if they are discarded, or a process failed to
        write. Nothing has changed then.
        """
        self._write(self._agreed(wanted(weights, scale)))

    def check(self, weights: Weights, scale: float = 1.0) -> None:
        """Raise what `activate` would raise, and change nothing."""
        self._agreed(wanted(weights, scale))

    def exchange(self, name: str, after: LoadedAdapter) -> None:
        """Hold other values for an adapter, in the weights too if it is active, or change nothing.

        Errors are those of `activate`.
        """
        nbytes = max(gather(self.processes, nbytes_of(after.entries)))
        before, there = self.adapters[name], self._weights.state
        try:
            self.adapters[name] = after._replace(nbytes=nbytes)
            if name in self.active:
                self.activate(self.active)
        except BaseException:
            if self._weights.state is there:
                self.adapters[name] = before
            raise

    def patches(self, scales: Mapping[str, float]) -> Plan[Storage]:
        """Return what these adapters, each times its scale, put into each weight; none is written.

        `AdapterError` as of `activate`.
        """
        self._bring_back(scales)
        return _state_of(self.adapters, scales).plan

    @contextmanager
    def inside(self, plan: Plan[Storage]) -> Iterator[None]:
        """Have `patches` in weights that hold the base, while something is computed with them."""
        writes = Exchanges(
            Exchange(storage.weight, None, patch, check=False) for storage, patch in plan.items()
        )
        with self._switching:
            try:
                writes.run()
                yield
            finally:
                writes.roll_back()
                if self._beside is not None and torch.accelerator.is_available():
                    torch.accelerator.current_stream().synchronize()  # before a thread reads them

    def sleep(self, level: int) -> None:
        """Note that the engine is going to sleep; at level 2 it drops the weights.

        A load that is under way reads them to its end first. From level 1 on their memory may be
        freed: until `wake`, or after level 2 `rebase`, they are neither read nor written.
        """
        if self._beside is not None:
            with suppress(Exception):  # `end_load` raises it
                self._beside.result()
        self.asleep |= slept(level) >= 1
        if level >= 2:
            self.discarded = True
            self._base_changes += 1

    def wake(self) -> None:
        """Note that the engine's weights are in their memory again."""
        self.asleep = False

    def rebase(self, *, check: bool = True) -> None:
        """Apply what was active to the base's weights, loaded anew into the same memory.

        Without ``check`` they may have other values than the old ones at the entries of adapters.
        """
        anew, after = agree(self.processes, lambda: self._anew(check))
        self.adapters.update(anew)
        if not check:
            for name, each in self.holding.on_disk.items():
                self.holding.on_disk[name] = each._replace(base=None)
        self._weights.forget()
        self.discarded = self.asleep = False
        self._base_changes += 1
        self._write(after)

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of all weights of this process: ``base``, whatever is active, and as is."""
        self._check_awake()
        base, now = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for storage in storages_of(self.model).values():
            patch = self._weights.state.plan.get(storage)
            for start in range(0, storage.weight.numel(), _CHUNK):
                chunk = storage.weight[start : start + _CHUNK].cpu()
                now.update(chunk.view(torch.uint8).numpy().data)
                if patch is not None:
                    here = (patch.offsets >= start) & (patch.offsets < start + chunk.numel())
                    at = patch.offsets[here].long().cpu() - start
                    chunk = chunk.index_copy(0, at, patch.originals[here].cpu())
                base.update(chunk.view(torch.uint8).numpy().data)
        return {"base": base.hexdigest(), "weights": now.hexdigest()}

    def locate(self, name: str, support: Support) -> list[Piece]:
        """Return the entries of a parameter that this process keeps, place by place."""
        return _pieces(self.split(name, support), self._placed)

    def _placed(self, key: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
        """Return where this process keeps a tensor of the checkpoint."""
        if (key, shape) not in self._placements:
            placements = trace(self.model, key, shape, self.dtype)
            self.refuse(key, placements)
            self._placements[key, shape] = placements
        return self._placements[key, shape]

    def _agreed(self, scales: Mapping[str, float]) -> State[Storage]:
        """Return the state with these adapters, if every process can write it."""
        agree(self.processes, self._check_awake)
        self._bring_back(scales)
        return agree(self.processes, lambda: self._checked(scales))

    def _checked(self, scales: Mapping[str, float]) -> State[Storage]:
        for name in scales:
            self.holding.use(name)
        self._check_in_place(scales)
        after = _state_of(self.adapters, scales)
        try:
            self._weights.compare(after.plan)
        except ChangedWeightError as error:
            raise SwitchError(
                f"{error.entry} was changed by something else since adapters were loaded (reloaded "
                "or trained on?), so that originals are not known. If the weights are a whole base "
                "again, rebase: adapters then count from it, and what was active is applied anew"
            ) from None
        return after

    def _bring_back(self, names: Collection[str], beyond: bool = False) -> None:
        """Have adapters in memory, those on disk read again."""
        agree(self.processes, lambda: [self.holding.known(name) for name in names])
        if not beyond:
            self.holding.make_room(names, self.active)
        for name in names:
            if name not in self.adapters:
                self.holding.bring_back(name, self._read_again(name))

    def _read_again(self, name: str) -> LoadedAdapter:
        agree(self.processes, self._check_awake)
        before, (read, path) = self.holding.on_disk[name], self.holding.sources[name]
        self._follow_memory()
        with self._naming(name, path):
            return load_again(before, read, self.locate, self._steady, self.processes)

    @contextmanager
    def _naming(self, name: str, path: str) -> Iterator[None]:
        """Let errors of reading an adapter again tell which it is, and what to do."""
        try:
            yield
        except (ShiraError, OSError) as error:
            kind = type(error) if isinstance(error, ServeError | SwitchError) else AdapterError
            raise kind(
                f"adapter {name!r} was dropped from memory and cannot be read again from {path}: "
                f"{error}. Put back the file that was loaded, or unload {name!r} and load it again"
            ) from error

    def _follow_memory(self) -> None:
        """Forget where tensors of the checkpoint lie if the model's weights have been replaced."""
        known = {placement.storage.key for each in self._placements.values() for placement in each}
        if not known <= storage_keys(self.model):
            self._placements.clear()

    def _anew(self, check: bool) -> tuple[dict[str, LoadedAdapter], State[Storage]]:
        self._check_in_place(self.adapters)
        adapters = {}
        for name, loaded in self.adapters.items():
            entries = {}
            for storage, (values, patch) in loaded.entries.items():
                assert values is not None  # whole tensors are not served
                entries[storage] = entry_at(storage, patch.offsets, values, {})
                if check and not same_bits(entries[storage].patch.originals, patch.originals):
                    raise WrongBaseError(
                        f"the weights that were loaded are not those of before, at the entries of "
                        f"adapter {name!r}; rebase(check=False) applies it nevertheless"
                    )
            adapters[name] = loaded.with_entries(entries, loaded.nbytes)
        return adapters, _state_of(adapters, self.active)

    @contextmanager
    def _steady(self) -> Iterator[Plan[Storage]]:
        with self._switching:
            yield self._weights.state.plan
            if torch.accelerator.is_available():
                torch.accelerator.current_stream().synchronize()  # what is read has been read

    def _write(self, after: State[Storage]) -> None:
        touched = {*self._weights.state.plan, *after.plan}

        def changed() -> Collection[Storage]:
            return touched if self._weights.unfinished else self._weights.state.plan

        with self._switching, self.writing(touched, changed):
            self._weights.exchange(
                after, check=False, together=lambda write: agree(self.processes, write)
            )

    def _check_awake(self) -> None:
        self._check_whole()
        if self.asleep:
            raise ServeError(
                "the engine is asleep, and the memory of its weights may be freed: wake it up, and "
                "call shira_wake on all workers, as the client's wake_up does"
            )

    def _check_whole(self) -> None:
        if self._weights.unfinished:
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
        here = storage_keys(self.model)
        for name in names:
            if not {storage.key for storage in self.adapters[name].entries} <= here:
                raise ServeError(
                    f"the weights of adapter {name!r} lie in other memory than when it was loaded: "
                    "deactivate, unload and load it again"
                )


def _pieces(
    parts: Iterable[Part], placed: Callable[[str, tuple[int, ...]], tuple[Placement, ...]]
) -> list[Piece]:
    pieces = []
    for stored, entries, flat in parts:
        for storage, box in placed(stored.key, stored.shape):
            here, positions = box.locate(flat)
            here = here if isinstance(entries, slice) else entries[here]
            pieces.append(Piece(storage, here, positions))
    return pieces


def _state_of(adapters: Mapping[str, LoadedAdapter], scales: Mapping[str, float]) -> State[Storage]:
    members = [(name, scale, adapters[name].entries) for name, scale in scales.items()]
    return State(tuple(scales.items()), combined(members))
