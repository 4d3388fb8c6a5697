# SPDX-License-Identifier: Apache-2.0
"""`AsyncClient`: adapters of an ``AsyncLLM``; in the order of steps of `shira.serve.changes`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from shira.serve import changes
from shira.serve.changes import Cache, Changes, EngineGoneError, Steps, unreachable
from shira.serve.journal import Record, drive_async, restoring
from shira.serve.messages import Weights, located, named, salted, slept, wanted
from shira.serve.scheduler import AdapterScheduler

T = TypeVar("T")


class AsyncClient(Changes):
    """Adapters of an ``AsyncLLM``, on one event loop.

    Made with ``await AsyncClient.of(engine)``. Arguments and errors are those of
    `shira.serve.client.Client`. A caller that is cancelled does not stop a change half way.
    """

    def __init__(self, engine: Any, *, cache: Cache = "reset") -> None:
        super().__init__(engine, cache, asyncio.Lock, partial(AdapterScheduler, _no_switch))
        self.engine = engine
        self._gate = self._shared.gate

    @classmethod
    async def of(cls, engine: Any, *, cache: Cache = "reset") -> AsyncClient:
        """Return a client that knows what is active in the engine."""
        client = cls(engine, cache=cache)
        await client._do(client._call("shira_list"))
        return client

    async def restore(self, record: Record) -> None:
        """As `Client.restore`."""
        do: dict[str, Callable[..., Awaitable[Any]]]
        do = {"load": self.load, "unload": self.unload, "activate": self.activate}
        steps = restoring(replace(record, combinations={}))
        await drive_async(steps, lambda kind, *args: do[kind](*args))

    async def load(self, name: str, path: str, *, compare: bool = True) -> dict[str, Any]:
        """As `Client.load`; requests go on between its steps."""
        loading = self._loading(named(name), located(path), bool(compare))
        return await _whole(self._locked(loading))  # type: ignore[no-any-return]

    async def unload(self, name: str) -> None:
        """As `Client.unload`."""
        await _whole(self._locked(self._unloading(named(name))))

    async def list(self) -> dict[str, Any]:
        """As `Client.list`."""
        return (await self._locked(self._call("shira_list"))).first  # type: ignore[no-any-return]

    async def fingerprint(self) -> Sequence[dict[str, Any]]:
        """As `Client.fingerprint`."""
        said = await self._locked(self._call("shira_fingerprint"))
        return said.each  # type: ignore[no-any-return]

    async def activate(self, weights: Weights, scale: float = 1.0) -> None:
        """Activate as `Client` does, after running requests; new ones queue meanwhile."""
        switching = self._switching(wanted(weights, scale), self.engine.reset_encoder_cache)
        await _whole(self._alone(switching, pause=True))

    async def check(self, weights: Weights, scale: float = 1.0) -> None:
        """Check as `Client` does."""
        await self._locked(self._call("shira_check", wanted(weights, scale)))

    async def deactivate(self) -> None:
        """Make the base active again, bit for bit."""
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
        """Run ``engine.generate`` under the state at its start; a switch waits for its end."""
        async with self._gate.using(None):
            if self.cache == "salt":
                prompt = salted(prompt, self.salt)
            async for output in self.engine.generate(prompt, sampling_params, request_id, **kwargs):
                yield output

    async def sleep(self, level: int = 1) -> None:
        """As `Client.sleep`, but waits for running requests."""
        await _whole(self._alone(self._sleeping(slept(level), mode="wait")))

    async def wake_up(self) -> None:
        """As `Client.wake_up`."""
        await _whole(self._locked(self._waking()))

    async def _locked(self, steps: Steps) -> Any:
        async with self._lock:
            return await self._do(steps)

    async def _alone(self, steps: Steps, *, pause: bool = False) -> None:
        async with self._lock, self._gate.alone():
            if not pause:
                await self._do(steps)
                return
            async with self._paused():
                await self._do(steps)

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """No request runs inside; an engine that was paused before stays so."""
        was_paused = await self._ask("is_paused", self.engine.is_paused())

        async def resume() -> None:
            if not (was_paused or self._shared.stale):
                await self._ask("resume_generation", self.engine.resume_generation())

        try:
            # mode "keep" would let one answer mix two adapters
            waiting = self.engine.pause_generation(mode="wait", clear_cache=False)
            await self._ask("pause_generation", waiting)
            yield
        except BaseException:
            with suppress(Exception):  # the first error counts
                await resume()
            raise
        await resume()

    async def _do(self, steps: Steps) -> Any:
        answer = None
        try:
            while True:
                what, call = steps.send(answer)
                answer = await self._ask(what, call())
        except StopIteration as end:
            return end.value

    async def _ask(self, what: str, call: Awaitable[Any]) -> Any:
        """Await a call into the engine as long as it lives."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=changes.LOOK))[0]:
                if getattr(self.engine, "errored", False):
                    raise EngineGoneError
            return task.result()
        except Exception as error:
            raise unreachable(what, error) from error
        finally:
            task.cancel()


async def _whole(change: Coroutine[Any, Any, T]) -> T:
    """Await a change of the engine, which goes on to its end also if the caller is cancelled."""
    return await asyncio.shield(asyncio.ensure_future(change))


async def _no_switch(adapter: Any) -> None:
    raise AssertionError("the client switches by itself, alone")
