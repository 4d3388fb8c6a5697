# SPDX-License-Identifier: Apache-2.0
"""`AsyncClient`: adapters of an ``AsyncLLM``; in the order of steps of ``shira.serve.client``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from shira.errors import ServeError
from shira.serve.journal import Kept, Record
from shira.serve.reports import Reports, checked, located, named, salted, slept, wanted
from shira.serve.restoring import drive_async, steps
from shira.serve.shared import NO_RESET, Cache, Weights, policy, shared_of
from shira.serve.watch import unreachable, watched_async

T = TypeVar("T")


async def _whole(change: Coroutine[Any, Any, T]) -> T:
    """Await a change of the engine, which goes on to its end also if the caller is cancelled."""
    return await asyncio.shield(asyncio.ensure_future(change))


class _Pause:
    """Why the engine stays paused afterwards: it was before, or must not run as it is."""

    was = False
    hold = False


class AsyncClient:
    """Adapters of an ``AsyncLLM``, on one event loop.

    Made with ``await AsyncClient.of(engine)``. Arguments and errors are those of
    `shira.serve.client.Client`. A caller that is cancelled does not stop a change half way.
    """

    def __init__(self, engine: Any, *, cache: Cache = "reset") -> None:
        self.engine = engine
        self.cache = policy(cache)
        self._shared = shared_of(engine, asyncio.Lock)
        self._lock, self._gate = self._shared.lock, self._shared.gate

    @classmethod
    async def of(cls, engine: Any, *, cache: Cache = "reset") -> AsyncClient:
        """A client that knows what is active in the engine."""
        client = cls(engine, cache=cache)
        await client._call("shira_list")
        return client

    @property
    def active(self) -> dict[str, float]:
        """What is active: scale by name; empty for the base."""
        return dict(self._shared.reports.active)

    @property
    def salt(self) -> str:
        """The ``cache_salt`` of the present state."""
        return self._shared.reports.salt

    @property
    def record(self) -> Record:
        """As `Client.record`."""
        return self._shared.record()

    async def restore(self, record: Record) -> None:
        """As `Client.restore`."""
        do: dict[str, Callable[..., Awaitable[Any]]]
        do = {"load": self.load, "unload": self.unload, "activate": self.activate}
        await drive_async(
            steps(replace(record, combinations={})), lambda kind, *args: do[kind](*args)
        )

    async def load(self, name: str, path: str, *, compare: bool = True) -> dict[str, Any]:
        """As `Client.load`; requests go on between its steps."""
        return await _whole(self._load(named(name), located(path), bool(compare)))

    async def unload(self, name: str) -> None:
        """As `Client.unload`."""
        await _whole(self._unload(named(name)))

    async def list(self) -> dict[str, Any]:
        """As `Client.list`."""
        async with self._lock:
            return (await self._call("shira_list")).first

    async def fingerprint(self) -> Sequence[dict[str, Any]]:
        """As `Client.fingerprint`."""
        async with self._lock:
            return (await self._call("shira_fingerprint")).each

    async def activate(self, weights: Weights, scale: float = 1.0) -> None:
        """Activate as `Client` does, after running requests; new ones queue meanwhile."""
        await _whole(self._switch(wanted(weights, scale)))

    async def check(self, weights: Weights, scale: float = 1.0) -> None:
        """Check as `Client` does."""
        which = wanted(weights, scale)
        async with self._lock:
            await self._call("shira_check", which)

    async def deactivate(self) -> None:
        """The base again, bit for bit."""
        await self.activate(None)

    @asynccontextmanager
    async def using(self, weights: Weights, scale: float = 1.0) -> AsyncIterator[None]:
        """Make adapters active for a while, and then what was."""
        before = self.active
        await self.activate(weights, scale)
        try:
            yield
        finally:
            await self.activate(before)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """``engine.generate`` under the state at its start; a switch waits until it has ended."""
        async with self._gate.shared():
            if self.cache == "salt":
                prompt = salted(prompt, self.salt)
            async for output in self.engine.generate(prompt, sampling_params, request_id, **kwargs):
                yield output

    async def sleep(self, level: int = 1) -> None:
        """As `Client.sleep`, but waits for running requests."""
        await _whole(self._sleep(slept(level)))

    async def wake_up(self) -> None:
        """As `Client.wake_up`."""
        await _whole(self._wake_up())

    async def _load(self, name: str, path: str, compare: bool) -> dict[str, Any]:
        async with self._lock:
            said = (await self._call("shira_load", name, path, compare)).first
            self._shared.kept[name] = Kept(path, said["digest"])
            return said

    async def _unload(self, name: str) -> None:
        async with self._lock:
            await self._call("shira_unload", name)
            self._shared.kept.pop(name, None)

    async def _sleep(self, level: int) -> None:
        async with self._lock, self._gate.alone():
            await self._call("shira_sleep", level)
            self._shared.discarded = level >= 2
            await self._ask("sleep", self.engine.sleep(level=level, mode="wait"))

    async def _wake_up(self) -> None:
        async with self._lock:
            if self._shared.discarded:
                await self._ask("wake_up", self.engine.wake_up(tags=["weights"]))
                await self._ask("reload_weights", self.engine.collective_rpc("reload_weights"))
                await self._call("shira_rebase")
                self._shared.discarded = False
            await self._ask("wake_up", self.engine.wake_up())

    async def _switch(self, weights: Mapping[str, float]) -> None:
        async with self._lock, self._gate.alone(), self._paused() as pause:
            said = await self._call("shira_activate", weights)
            if self.cache == "reset" and not await self._drop_caches():
                pause.hold = True  # no request may run if this fails
                await self._call("shira_activate", said.first["previous"])
                pause.hold = False
                raise ServeError(NO_RESET)

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[_Pause]:
        """No request runs inside; an engine that was paused before stays so."""
        pause = _Pause()
        pause.was = await self._ask("is_paused", self.engine.is_paused())
        try:
            # mode "keep" would let one answer mix two adapters
            waiting = self.engine.pause_generation(mode="wait", clear_cache=False)
            await self._ask("pause_generation", waiting)
            yield pause
        except BaseException:
            with suppress(Exception):  # the first error counts
                await self._resume(pause)
            raise
        await self._resume(pause)

    async def _resume(self, pause: _Pause) -> None:
        if not (pause.was or pause.hold):
            await self._ask("resume_generation", self.engine.resume_generation())

    async def _drop_caches(self) -> bool:
        await self._ask("reset_encoder_cache", self.engine.reset_encoder_cache())
        reset = self.engine.reset_prefix_cache(reset_connector=True)
        return bool(await self._ask("reset_prefix_cache", reset))

    async def _call(self, method: str, *args: Any) -> Reports:
        answers = await self._ask(method, self.engine.collective_rpc(method, args=args))
        self._shared.reports = checked(answers, method)
        return self._shared.reports

    async def _ask(self, what: str, call: Awaitable[T]) -> T:
        try:
            return await watched_async(self.engine, call)
        except Exception as error:
            raise unreachable(what, error) from error
