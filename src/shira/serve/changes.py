# SPDX-License-Identifier: Apache-2.0
"""The steps of each change of a vLLM engine, for both of its clients.

vLLM invalidates nothing when weights change: blocks of its prefix cache that the old weights filled
answer for the new ones. A switch is therefore: wait until no request runs (new ones queue), switch
all ranks or none, drop the caches and check that vLLM did, go on. Where the caches are not dropped,
for whatever reason, the switch is taken back.

`Changes` writes the steps as coroutines that ask the engine by `Changes._ask`. The one of
`shira.serve.async_client.AsyncClient` awaits; that of `shira.serve.client.Client` returns without,
so that `completed` has the outcome at once. Imports nothing of vLLM.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

from shira.errors import ConfigError, ServeError
from shira.serve.journal import Kept, Record
from shira.serve.messages import checked

T = TypeVar("T")

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

    Attributes:
        lock: Held while anything is changed.
        gate: Of the asynchronous clients: requests share it, a switch is alone.
        discarded: Whether the engine sleeps without its weights.
        stale: Whether its caches may hold answers of other weights: no request may run.
        reports: The workers' last answers.
        kept: Adapters that were loaded through the clients, by name.
    """

    lock: Any
    gate: Any
    discarded: bool = False
    stale: bool = False
    reports: list[dict[str, Any]] = field(default_factory=lambda: [{"active": {}, "state": "base"}])
    kept: dict[str, Kept] = field(default_factory=dict)


_ENGINES: weakref.WeakKeyDictionary[Any, Shared] = weakref.WeakKeyDictionary()


class EngineGoneError(Exception):
    """The engine died before it answered."""

    def __init__(self) -> None:
        super().__init__("it died before it answered")


class Changes:
    """The state of an engine and the steps that change it: the base of both clients.

    Args:
        engine: The engine.
        cache: ``"reset"`` or ``"salt"``.
        lock: Makes the lock for the first client of the engine.
        gate: Makes its gate.

    Raises:
        ConfigError: If there is no such cache policy.
    """

    def __init__(
        self,
        engine: Any,
        cache: Cache,
        lock: Callable[[], Any],
        gate: Callable[[], Any] = lambda: None,
    ) -> None:
        if cache not in ("reset", "salt"):
            raise ConfigError(f"cache is 'reset' or 'salt', not {cache!r}")
        self.cache = cache
        if engine not in _ENGINES:
            _ENGINES[engine] = Shared(lock(), gate())
        self._engine = engine
        self._shared = _ENGINES[engine]
        self._lock = self._shared.lock

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

    async def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        """Call into the engine; `unreachable` has the error if it does not answer."""
        raise NotImplementedError

    async def _call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        answers = await self._ask(method, lambda: self._engine.collective_rpc(method, args=args))
        self._shared.reports = checked(answers, method)
        return self._shared.reports

    async def _load(self, name: str, path: str, compare: bool) -> dict[str, Any]:
        said = (await self._call("shira_load", name, path, compare))[0]
        self._shared.kept[name] = Kept(path, said["digest"])
        return said

    async def _unload(self, name: str) -> None:
        await self._call("shira_unload", name)
        self._shared.kept.pop(name, None)

    async def _switch(self, weights: Mapping[str, float], reset_encoder_cache: Any) -> None:
        self._shared.stale = False
        said = (await self._call("shira_activate", weights))[0]
        if self.cache == "salt":
            return
        self._shared.stale = True  # until they are dropped, or what was active is so again
        try:
            dropped = await self._drop_caches(reset_encoder_cache)
        except BaseException:
            with suppress(Exception):  # the first error counts
                await self._take_back(said["previous"])
            raise
        if not dropped:
            await self._take_back(said["previous"])
            raise ServeError(
                "vLLM did not drop its prefix cache (blocks are in use), so old weights would have "
                "answered for new ones; the switch was taken back"
            )
        self._shared.stale = False

    async def _take_back(self, previous: Mapping[str, float]) -> None:
        await self._call("shira_activate", previous)
        self._shared.stale = False

    async def _drop_caches(self, reset_encoder_cache: Any) -> bool:
        await self._ask("reset_encoder_cache", reset_encoder_cache)
        reset = partial(self._engine.reset_prefix_cache, reset_connector=True)
        return bool(await self._ask("reset_prefix_cache", reset))

    async def _sleep(self, level: int, **mode: str) -> None:
        await self._call("shira_sleep", level)
        self._shared.discarded = level >= 2
        await self._ask("sleep", partial(self._engine.sleep, level=level, **mode))

    async def _wake_up(self) -> None:
        if self._shared.discarded:
            await self._ask("wake_up", partial(self._engine.wake_up, tags=["weights"]))
            reload = partial(self._engine.collective_rpc, "reload_weights")
            await self._ask("reload_weights", reload)
            await self._call("shira_rebase")
            self._shared.discarded = False
        await self._ask("wake_up", self._engine.wake_up)


def completed(change: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits; return its result."""
    try:
        change.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError(f"{change} waits")


def unreachable(method: str, error: Exception) -> ServeError:
    """Return the error for an engine that did not answer a call."""
    if "has no attribute" in str(error):
        return ServeError(
            f"vLLM's workers do not know {method}: start the engine with "
            "worker_extension_cls='shira.serve.vllm.ShiraWorkerExtension'"
        )
    return ServeError(
        f"{method}: vLLM's engine failed ({type(error).__name__}: {error}). If a worker died the "
        "engine is lost and must be started again; its checkpoint on disk was never written"
    )
