# SPDX-License-Identifier: Apache-2.0
"""`AsyncClient`: adapters of an ``AsyncLLM``; in the order of steps of `shira.serve.changes`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

from shira.serve import changes
from shira.serve.changes import Cache, Change, Changes, EngineGoneError
from shira.serve.messages import Weights, salted


class AsyncClient(
    Changes[
        Coroutine[Any, Any, None],
        Coroutine[Any, Any, dict[str, Any]],
        Coroutine[Any, Any, Sequence[dict[str, Any]]],
    ]
):
    """Adapters of an ``AsyncLLM``, on one event loop.

    Made with ``await AsyncClient.of(engine)``. Methods, arguments and errors are those of
    `shira.serve.client.Client`, but are awaited. A caller that is cancelled does not stop a change
    half way.
    """

    _sleep_mode = MappingProxyType({"mode": "wait"})

    def __init__(self, engine: Any, *, cache: Cache = "reset") -> None:
        super().__init__(engine, cache, asyncio.Lock)
        self.engine = engine
        self._gate = self._shared.gate

    @classmethod
    async def of(cls, engine: Any, *, cache: Cache = "reset") -> AsyncClient:
        """Return a client that knows what is active in the engine."""
        client = cls(engine, cache=cache)
        await client.list()
        return client

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

    async def _do(self, change: Change, *arguments: Any) -> Any:  # type: ignore[override]
        async def locked() -> Any:
            async with self._lock:
                return await change(*arguments)

        return await asyncio.shield(asyncio.ensure_future(locked()))

    @asynccontextmanager
    async def _alone(self, *, pause: bool = False) -> AsyncIterator[None]:
        async with self._gate.alone(), self._paused() if pause else nullcontext():
            yield

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """No request runs inside; an engine that was paused before stays so."""
        was_paused = await self._ask("is_paused", self.engine.is_paused)

        async def resume() -> None:
            if not (was_paused or self._shared.stale):
                await self._ask("resume_generation", self.engine.resume_generation)

        try:
            # mode "keep" would let one answer mix two adapters
            pause = partial(self.engine.pause_generation, mode="wait", clear_cache=False)
            await self._ask("pause_generation", pause)
            yield
        except BaseException:
            with suppress(Exception):  # the first error counts
                await resume()
            raise
        await resume()

    async def _answer(self, call: Callable[[], Any]) -> Any:
        task = asyncio.ensure_future(call())
        try:
            while not (await asyncio.wait({task}, timeout=changes.LOOK))[0]:
                if getattr(self.engine, "errored", False):
                    raise EngineGoneError("it died before it answered")
            return task.result()
        finally:
            task.cancel()
