# SPDX-License-Identifier: Apache-2.0
"""The changes of a vLLM engine: the methods that both of its clients have, and their steps.

vLLM invalidates nothing when weights change: blocks of its prefix cache that the old weights filled
answer for the new ones. A switch is therefore: wait until no request runs (new ones queue), switch
all ranks or none, drop the caches and check that vLLM did, go on. Where the caches are not dropped,
for whatever reason, the switch is taken back.

Each method of `Changes` makes a coroutine, which is run under the engine's lock and reaches the
engine by `Changes._answer`. The `AsyncClient` of `shira.serve.client` returns it, to be awaited; in
the `Client` it never waits and is over at its first step. Imports nothing of vLLM.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from shira.errors import (
    AdapterError,
    ConfigError,
    ServeError,
    ShiraError,
    UnknownAdapterError,
    did_you_mean,
    listed,
)
from shira.serve.journal import Kept, Record, restore
from shira.serve.messages import (
    Carried,
    Weights,
    carried,
    checked,
    located,
    named,
    slept,
    wanted,
)
from shira.serve.riders import Riders
from shira.serve.scheduler import AdapterScheduler

# Of a method: what it returns, or what is awaited for that.
Done = TypeVar("Done")
Report = TypeVar("Report")
Reports = TypeVar("Reports")
Face = TypeVar("Face")

Change: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]

Cache: TypeAlias = Literal["reset", "salt"]
"""The fate of the prefix cache at a switch."""

LOOK = 0.25
"""Seconds between two looks at the health of an engine that has not answered yet.

vLLM 0.32 never answers a call that its engine took before it died, so whoever merely waited for the
answer would wait for ever.
"""


@dataclass
class Shared:
    """The state of one engine, shared by its clients.

    Two switches of one engine must not interleave, and a request salted through one client must not
    meet a switch made through another.
    """

    lock: Any  # held while anything is changed
    # Requests of the asynchronous clients share it, a switch is alone.
    gate: AdapterScheduler = field(default_factory=lambda: AdapterScheduler(_no_switch))
    asleep: int = 0  # the level at which the engine sleeps; 0 too if it is awake
    stale: bool = False  # its caches may hold answers of other weights: no request may run
    # The workers' last answers.
    reports: list[dict[str, Any]] = field(default_factory=lambda: [{"active": {}, "state": "base"}])
    kept: dict[str, Kept] = field(default_factory=dict)  # loaded through the clients, by name
    loading: bool = False  # beside the engine's steps
    mixing: bool = False  # requests may carry adapters of their own
    # Why adapters with their scales cannot ride, as far as it is known; empty if they can.
    why_not: dict[tuple[tuple[str, float], ...], str] = field(default_factory=dict)
    riders: Riders = field(default_factory=Riders)


async def _no_switch(adapter: Any) -> None:
    raise AssertionError("the client switches by itself, alone")


_ENGINES: weakref.WeakKeyDictionary[Any, Shared] = weakref.WeakKeyDictionary()


_MEMORY = "limit", "in_memory", "on_disk", "pinned"  # of a report: see `Holding.report`


class EngineGoneError(Exception):
    """The engine died before it answered."""


class Changes(Generic[Done, Report, Reports]):
    """The state of an engine and what changes it; the first client of an engine makes its lock."""

    _sleep_mode: ClassVar[Mapping[str, str]] = {}

    def __init__(self, engine: Any, cache: Cache, lock: Callable[[], Any]) -> None:
        if cache not in ("reset", "salt"):
            raise ConfigError(f"cache is 'reset' or 'salt', not {cache!r}")
        self.cache = cache
        self._engine = engine
        self._shared = _ENGINES.setdefault(engine, Shared(lock()))
        self._lock = self._shared.lock
        self.waiting: Callable[[], Collection[str]] = tuple
        """Names the adapters that requests wait for: with `limit`, they are dropped last."""

    @property
    def active(self) -> dict[str, float]:
        """Scale by name of what is active; empty for the base."""
        return dict(self._shared.reports[0]["active"])

    @property
    def salt(self) -> str:
        """The ``cache_salt`` of the present state: equal if equal states compute equal answers."""
        return f"shira-{self._shared.reports[0]['state']}"

    @property
    def record(self) -> Record:
        """The adapters that clients of this engine loaded, and the active ones; also of a lost one.

        `shira.serve.journal` writes it to a file and reads it. Values that a `ValueSender` sent are
        not in it: the adapter's file has those of before.
        """
        return Record(dict(self._shared.kept), {}, self.active)

    def restore(self, record: Record) -> Done:
        """Load and activate in this engine, a new one, what another held.

        Raises:
            RestoreError: If files are gone or have changed since, each of them named; the others
                are there, and the base is active if what was active could not be made so.
            ServeError: If this engine is lost, too.
        """
        return self._do(self._restore, record)

    def load(self, name: str, path: str, *, compare: bool = True) -> Report:
        """Let every worker hold the adapter at a path; returns what rank 0 said of it.

        Raises:
            ShiraError: As `ShiraWorkerExtension.shira_load` says; no worker holds it then.
            FileNotFoundError: If there is nothing at the path.
        """
        return self._do(self._load, name, path, compare)

    def unload(self, name: str) -> Done:
        """Let every worker forget an adapter that is not active."""
        return self._do(self._unload, name)

    def limit(self, max_adapter_memory: int | None) -> Done:
        """Bound the memory of each worker that adapters take; see `shira.serve.holding`.

        Beyond it the least recently used are left to their files, which are read again at the next
        use, and must still be there and be what they were. A request that brings adapters along
        waits until there is room for them beside those that others in flight ride on.

        Args:
            max_adapter_memory: Bytes; None: as many as there are.

        Raises:
            ConfigError: If it is no such number, or too little for what is in use.
        """
        return self._do(self._limit, max_adapter_memory)

    def list(self) -> Report:
        """Return what rank 0 holds: ``adapters``, ``active``, ``state``."""
        return self._do(self._list)

    def fingerprint(self) -> Reports:
        """Return, for each rank, hashes of its weights: ``base``, and as they are."""
        return self._do(self._fingerprint)

    def activate(self, weights: Weights, scale: float = 1.0) -> Done:
        """Make adapters active on all ranks, in place of those that are.

        An ``LLM`` must have no unfinished requests. An ``AsyncLLM`` ends those that run first, and
        new ones queue meanwhile.

        Args:
            weights: A name, ``{name: scale, ...}``, or None for the base.
            scale: With a single name, its factor.

        Raises:
            AdapterError: If a name or a scale is none; see `shira.delta.checked_scale`.
            ServeError: If requests are unfinished, or the caches could not be dropped.
            ShiraError: As `ShiraWorkerExtension.shira_activate` says. Nothing has changed.
        """
        return self._do(self._activate, weights, scale)

    def deactivate(self) -> Done:
        """Make the base active again, bit for bit; raises as `activate`."""
        return self.activate(None)

    def mix(self) -> Report:
        """Let requests for different adapters run in one batch from now on, if the engine can.

        Returns what rank 0 said, among it ``steps``, a count of those with adapters so far.

        Raises:
            ServeError: If the engine is of a kind whose batches cannot be mixed; it says why.
        """
        return self._do(self._mix)

    def check(self, weights: Weights, scale: float = 1.0) -> Done:
        """Raise what `activate` would raise of these adapters and scales; nothing changes."""
        return self._do(self._check, weights, scale)

    def sleep(self, level: int = 1) -> Done:
        """Let the engine sleep. Loaded adapters and what is active survive both levels.

        At level 1 vLLM keeps the weights, with what is active in them; at level 2 it drops them,
        and `wake_up` loads the base anew and applies what was active. From level 1 on nothing is
        loaded or switched until then. Requests are as in `activate`.
        """
        return self._do(self._sleep, level)

    def wake_up(self) -> Done:
        """Wake the engine, after level 2 with the weights reloaded before any request runs."""
        return self._do(self._wake_up)

    def _do(self, change: Change, *arguments: Any) -> Face:  # type: ignore[type-var]
        """Run a change under the lock; return its outcome, or what is awaited for that."""
        raise NotImplementedError

    async def _answer(self, call: Callable[[], Any]) -> Any:
        """Call into the engine; `EngineGoneError` if it dies before it answers."""
        raise NotImplementedError

    def _alone(self, *, pause: bool = False) -> AbstractAsyncContextManager[None]:
        """Have no request running inside the context; ``pause`` keeps them out of the engine."""
        raise NotImplementedError

    async def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return await self._answer(call)
        except Exception as error:
            if "has no attribute" in str(error):
                raise ServeError(
                    f"vLLM's workers do not know {what}: start the engine with "
                    "worker_extension_cls='shira.serve.vllm.ShiraWorkerExtension'"
                ) from error
            raise ServeError(
                f"{what}: vLLM's engine failed ({type(error).__name__}: {error}). If a worker died "
                "the engine is lost and must be started again; its checkpoint on disk was never "
                "written"
            ) from error

    async def _call(self, method: str, *args: Any) -> Sequence[dict[str, Any]]:
        answers = await self._ask(method, lambda: self._engine.collective_rpc(method, args=args))
        try:
            self._shared.reports = checked(answers, method)
        except ShiraError:  # adapters may have been dropped for it nevertheless
            said = answers[0] if answers and isinstance(answers[0], Mapping) else {}
            here = {key: said[key] for key in _MEMORY if key in said}
            self._shared.reports = [{**each, **here} for each in self._shared.reports]
            raise
        return self._shared.reports

    async def _restore(self, record: Record) -> None:
        def do(kind: str, *arguments: Any) -> Any:
            return getattr(self, f"_{kind}")(*arguments)

        await restore(replace(record, combinations={}), do)

    def _kept(self, *before: Any) -> tuple[Any, ...]:
        """Return arguments that end with who is waited for and who is ridden on, if anybody is."""
        riders = self._shared.riders
        told = [list(dict.fromkeys([*self.waiting(), *riders.in_line])), list(riders.on_board)]
        while told and not told[-1]:
            told.pop()
        return (*before, *told) if told else ()

    def _room_for(self, names: Collection[str]) -> bool:
        """Return whether adapters can be in memory beside those in use.

        `AdapterError` if they cannot, whatever requests end.
        """
        now = self._shared.reports[0]
        limit = now.get("limit")
        if limit is None:
            return True
        sizes, kept = {**now["on_disk"], **now["in_memory"]}, {*now["active"], *now["pinned"]}

        def nbytes(of: Iterable[str]) -> int:
            return sum(sizes.get(name, 0) for name in of)

        if nbytes({*names, *kept}) > limit:
            beside = f" beside the {nbytes(kept)} of {listed(sorted(kept))}, in use" if kept else ""
            raise AdapterError(
                f"adapters {listed(names)} take {nbytes(names)} bytes in a worker{beside}, and "
                f"max_adapter_memory is {limit}: ask for fewer of them together, raise it, or "
                "deactivate what is active"
            )
        return bool(nbytes({*names, *kept, *self._shared.riders.on_board}) <= limit)

    async def _load(self, name: str, path: str, compare: bool = True) -> dict[str, Any]:
        path = located(path)
        said = await self._load_by(named(name), path, bool(compare))
        self._shared.kept[name] = Kept(path, said["digest"])
        if "why_not" in said:
            self._shared.why_not[((name, 1.0),)] = said["why_not"]
        return said

    async def _load_by(self, name: str, path: str | None, compare: bool) -> dict[str, Any]:
        """Load an adapter; without a path bring one back from disk."""
        if path is not None:
            return (await self._call("shira_load", name, path, compare, *self._kept()))[0]
        await self._call("shira_begin_load", name, None, compare)
        return (await self._call("shira_end_load", *self._kept()))[0]

    async def _bring_back(self, names: Iterable[str]) -> None:
        """Have adapters in memory."""
        for name in names:
            if name in self._on_disk:
                await self._load_by(name, None, True)

    @property
    def _on_disk(self) -> Mapping[str, int]:
        return self._shared.reports[0].get("on_disk", {})  # type: ignore[no-any-return]

    async def _unload(self, name: str) -> None:
        if self._shared.mixing:
            async with self._alone():  # of the requests that came through the clients
                await self._call("shira_unload", named(name))
        else:
            await self._call("shira_unload", named(name))
        self._shared.kept.pop(name, None)
        known = self._shared.why_not
        self._shared.why_not = {each: why for each, why in known.items() if name not in dict(each)}

    async def _mix(self) -> dict[str, Any]:
        said = (await self._call("shira_mix"))[0]
        self._shared.mixing = True
        return said

    async def _why_not(self, weights: Weights) -> str:
        scales = wanted(weights)
        self._check_mixing()
        which = tuple(scales.items())
        if scales and which not in self._shared.why_not:
            await self._bring_back(scales)
            said = (await self._call("shira_why_not", scales, *self._kept()))[0]
            self._shared.why_not[which] = str(said["why_not"])
        return self._shared.why_not.get(which, "")

    async def _carry(self, weights: Weights) -> Carried | None:
        """Return what requests for adapters bring along; None for the base."""
        scales, kept = wanted(weights), self._shared.kept
        self._check_can_ride(scales)
        await self._bring_back(scales)
        await self._why_not(scales)
        self._check_can_ride(scales)  # and are still there
        return carried(scales, {name: kept[name].digest for name in scales}) if scales else None

    def _check_mixing(self) -> None:
        if not self._shared.mixing:
            raise ServeError("batches are not mixed: make the client with mixing=True")

    def _check_can_ride(self, scales: Mapping[str, float]) -> None:
        """Refuse adapters of which it is known here that requests cannot bring them along."""
        self._check_mixing()
        kept = self._shared.kept
        for name in scales:
            if name not in kept:
                raise UnknownAdapterError(
                    f"no adapter {name!r} was loaded by a client.{did_you_mean(name, kept)}"
                )
        if why := self._shared.why_not.get(tuple(scales.items())):
            raise ServeError(f"{why}: activate it instead")

    def _check_base(self) -> None:
        if self.active:
            raise ServeError(
                f"the weights hold {self.active}: deactivate() before requests bring adapters along"
            )

    async def _fingerprint(self) -> Sequence[dict[str, Any]]:
        said = await self._call("shira_fingerprint")
        # what adapters take is not the weights', and equal weights have equal fingerprints
        return [{key: each[key] for key in each if key not in _MEMORY} for each in said]

    async def _limit(self, max_adapter_memory: int | None) -> None:
        await self._call("shira_limit", max_adapter_memory, *self._kept())
        self._shared.riders.look_again()

    async def _list(self) -> dict[str, Any]:
        return (await self._call("shira_list"))[0]

    async def _check(self, weights: Weights, scale: float = 1.0) -> None:
        which = wanted(weights, scale)
        await self._bring_back(which)
        await self._call("shira_check", which, *self._kept(1.0))

    async def _activate(self, weights: Weights, scale: float = 1.0) -> None:
        which, riders = wanted(weights, scale), self._shared.riders
        if which.keys() & self._on_disk.keys() and self._room_for(which) and not riders.in_line:
            with riders.aboard(which):  # before the engine is paused; otherwise then
                await self._bring_back(which)
        async with self._alone(pause=True):
            await self._switch(which)

    async def _switch(self, weights: Mapping[str, float]) -> None:
        self._shared.stale = False
        said = (await self._call("shira_activate", weights, *self._kept(1.0)))[0]
        if self.cache == "salt":
            return
        self._shared.stale = True  # until they are dropped, or what was active is so again
        try:
            dropped = await self._drop_caches()
        except BaseException:
            with suppress(Exception):  # the first error counts
                await self._call("shira_activate", said["previous"])
                self._shared.stale = False
            raise
        if not dropped:
            await self._call("shira_activate", said["previous"])
        self._shared.stale = False
        if not dropped:
            raise ServeError(
                "vLLM did not drop its prefix cache (blocks are in use), so old weights would have "
                "answered for new ones; the switch was taken back"
            )

    async def _drop_caches(self) -> bool:
        inner = getattr(self._engine, "llm_engine", self._engine)
        await self._ask("reset_encoder_cache", inner.reset_encoder_cache)
        reset = partial(self._engine.reset_prefix_cache, reset_connector=True)
        return bool(await self._ask("reset_prefix_cache", reset))

    async def _sleep(self, level: int) -> None:
        level = slept(level)
        async with self._alone():
            await self._call("shira_sleep", level)
            self._shared.asleep = max(self._shared.asleep, level)
            sleep = partial(self._engine.sleep, level=level, **self._sleep_mode)
            await self._ask("sleep", sleep)

    async def _wake_up(self) -> None:
        if self._shared.asleep:  # the weights first, before any request runs
            await self._ask("wake_up", partial(self._engine.wake_up, tags=["weights"]))
        if self._shared.asleep >= 2:
            reload = partial(self._engine.collective_rpc, "reload_weights")
            await self._ask("reload_weights", reload)
            await self._call("shira_rebase")
        elif self._shared.asleep:
            await self._call("shira_wake")
        self._shared.asleep = 0
        await self._ask("wake_up", self._engine.wake_up)
