# SPDX-License-Identifier: Apache-2.0
"""`Holding`: the adapters that a worker knows, of which those in memory have a bound in bytes.

::

    load --> in memory --room is needed, least recently used first--> on disk
                 ^                                                       |
                 +------ the next use reads the file again --------------+

What is on disk is known by its hash, so that the file of before is used again, or none. What is in
use is never dropped: what is active, what is pinned, what requests in flight ride on (see
`shira.serve.mixed`), what is being switched to. An adapter of k entries takes `nbytes_of` bytes:
k times an offset (int32; int64 in a storage of more than 2^31 entries), a value in the file's
dtype, and two entries in the weight's dtype (the base's and the adapter's): 12 bytes an entry for
float32 values on bfloat16 weights, 16 on float32 weights.

Decisions follow from what all processes know alike, so that all drop the same.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from shira.adapter import Adapter
from shira.errors import AdapterError, ConfigError, UnknownAdapterError, did_you_mean, listed
from shira.serve.loading import LoadedAdapter


class Source(NamedTuple):
    """The file of an adapter."""

    read: Callable[[], Adapter]
    path: str


class Holding:
    """Adapters by name, those in memory bounded.

    Args:
        limit: Bytes of this process that adapters may take; None: as many as there are.

    Raises:
        ConfigError: If the limit is no positive number.
    """

    def __init__(self, limit: int | None = None) -> None:
        # An interrupt may leave a name in both for good; what is in memory counts then.
        self.in_memory: OrderedDict[str, LoadedAdapter] = OrderedDict()
        """The least recently used first."""
        self.on_disk: dict[str, LoadedAdapter] = {}
        """Those that were dropped; without entries."""
        self.sources: dict[str, Source] = {}
        """Of all of them."""
        self.waiting: Collection[str] = ()
        """Adapters that requests wait for: they are dropped last."""
        self.riding: Collection[str] = ()
        """Adapters that requests in flight bring along: they are in use."""
        self.let_go: Callable[[], object] = lambda: None
        """Called when adapters have left memory, to let go of what was made of them."""
        self._pins: Counter[str] = Counter()
        self.limit = checked_limit(limit)

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters in memory."""
        return sum(each.nbytes for each in self.in_memory.values())

    def report(self) -> dict[str, Any]:
        """Return what clients need to know: ``limit``, bytes by name where they are, ``pinned``."""
        in_memory, on_disk = (
            {name: each.nbytes for name, each in where.items()}
            for where in (self.in_memory, self.on_disk)
        )
        return {
            "limit": self.limit,
            "in_memory": in_memory,
            "on_disk": on_disk,
            "pinned": list(self._pins),
        }

    def known(self, name: str) -> LoadedAdapter:
        """Return an adapter, perhaps without entries; `UnknownAdapterError` if there is none."""
        for where in (self.in_memory, self.on_disk):
            if name in where:
                return where[name]
        hint = did_you_mean(name, [*self.in_memory, *self.on_disk])
        raise UnknownAdapterError(f"no adapter {name!r} is loaded.{hint}")

    def __contains__(self, name: str) -> bool:
        """Return whether an adapter of this name is known."""
        return name in self.in_memory or name in self.on_disk

    def use(self, name: str) -> LoadedAdapter:
        """Return an adapter in memory, from now on the most recently used."""
        self.in_memory.move_to_end(name)
        return self.in_memory[name]

    def set_limit(self, limit: int | None, active: Iterable[str]) -> None:
        """Take another limit, and drop what is too much; `ConfigError` if that is in use."""
        before, self.limit = self.limit, checked_limit(limit)
        used = self._used(active)
        coming = sum(self.on_disk[name].nbytes for name in used & self.on_disk.keys())
        dropped = self._room(coming, used)
        if dropped is None:
            self.limit = before
            raise ConfigError(
                f"max_adapter_memory={limit} is too little for the adapters in use "
                f"({listed(sorted(used))}): deactivate them first, and let requests end that ride "
                "on them"
            )
        self.drop(dropped)

    def add(self, name: str, loaded: LoadedAdapter, source: Source, active: Iterable[str]) -> None:
        """Take a new adapter: into memory, if what is in use leaves room, else on disk.

        `AdapterError` if there is never room for it.
        """
        if self.limit is not None and loaded.nbytes > self.limit:
            raise AdapterError(
                f"adapter {name!r} takes {loaded.nbytes} bytes in a worker, more than "
                f"max_adapter_memory={self.limit} allows for all of them"
            )
        dropped = self._room(loaded.nbytes, self._used(active))
        self.sources[name] = source
        if dropped is None:
            self.on_disk[name] = loaded.without_entries()
        else:
            self.drop(dropped)
            self.in_memory[name] = loaded

    def make_room(self, coming: Collection[str], active: Iterable[str]) -> None:
        """Drop what gives room to those of these adapters that are on disk.

        `AdapterError` if what is in use leaves too little.
        """
        missing = [name for name in coming if name not in self.in_memory]
        if not missing:
            return
        nbytes = sum(self.on_disk[name].nbytes for name in missing)
        used = {*self._used(active), *coming}
        dropped = self._room(nbytes, used)
        if dropped is None:
            held = sum(each.nbytes for name, each in self.in_memory.items() if name in used)
            raise AdapterError(
                f"{listed(coming)} cannot be brought back from disk: {nbytes} bytes are needed "
                f"beside the {held} of the adapters in use, and max_adapter_memory is "
                f"{self.limit}: it must hold those that are active, those that requests in flight "
                "ride on, and those that come"
            )
        self.drop(dropped)

    def bring_back(self, name: str, loaded: LoadedAdapter) -> None:
        """Take an adapter from disk into memory."""
        self.in_memory[name] = loaded
        self.on_disk.pop(name, None)

    def drop(self, names: Iterable[str]) -> None:
        """Leave adapters to their files."""
        for name in names:
            self.on_disk[name] = self.in_memory[name].without_entries()
            del self.in_memory[name]
        self.let_go()

    def forget(self, name: str) -> None:
        """Know an adapter no longer."""
        self.in_memory.pop(name, None)
        self.on_disk.pop(name, None)
        self._pins.pop(name, None)
        self.sources.pop(name, None)
        self.let_go()

    def pin(self, name: str) -> None:
        """Keep an adapter in memory until it is unpinned as often, or unloaded."""
        self._pins[name] += 1

    def unpin(self, name: str) -> None:
        """Take back one `pin`."""
        if self._pins[name] > 1:
            self._pins[name] -= 1
        else:
            del self._pins[name]

    def _used(self, active: Iterable[str]) -> set[str]:
        return {*active, *self._pins, *self.riding}

    def _room(self, nbytes: int, used: Collection[str]) -> list[str] | None:
        """Return what to drop so that there is room; None if what is in use leaves too little."""
        dropped: list[str] = []
        over = 0 if self.limit is None else self.nbytes + nbytes - self.limit
        for name in sorted(self.in_memory, key=lambda name: name in self.waiting):
            if over > 0 and name not in used:
                dropped.append(name)
                over -= self.in_memory[name].nbytes
        return None if over > 0 else dropped


def checked_limit(limit: object) -> int | None:
    """Check a bound of bytes, and return it."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"max_adapter_memory is a number of bytes, 1 or more, not {limit!r:.100}")
    return limit
