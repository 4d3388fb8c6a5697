# SPDX-License-Identifier: Apache-2.0
"""Drive the adapters of a vLLM engine so that no answer is ever stale or mixed.

`Client` is for ``vllm.LLM``, `AsyncClient` for ``AsyncLLM``; both need the worker extension
``shira.serve.vllm.ShiraWorkerExtension``. `shira.serve.changes` has the steps of each change. With
``cache="salt"`` the prefix cache is not dropped at a switch: each state's blocks are kept apart by
vLLM's ``cache_salt``, so that each finds its own again; then every request must go through
`generate`, which adds the salt.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, wait
from contextlib import (
    AsyncExitStack,
    ExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import partial
from typing import Any, ClassVar

from shira.errors import ConfigError, ServeError
from shira.serve import changes
from shira.serve.changes import Cache, Change, Changes, EngineGoneError
from shira.serve.messages import Carried, Weights, salted, wanted

_LOOK_AT_LOAD = 0.002, 0.05  # seconds between two looks at a load: at first, and at most

__all__ = ["AsyncClient", "Cache", "Client", "Weights"]


class Client(Changes[None, dict[str, Any], Sequence[dict[str, Any]]]):
    """Adapters of a ``vllm.LLM``.

    Args:
        llm: Made with ``worker_extension_cls="shira.serve.vllm.ShiraWorkerExtension"``.
        cache: ``"reset"`` drops the prefix cache at each switch. ``"salt"`` keeps it, each state's
            own; every request must then go through `generate`.
        mixing: Let requests bring adapters of their own, several in one batch; see `generate`.
        max_adapter_memory: Bytes of each worker that adapters may take; see `limit`. None: as
            before.

    Raises:
        ConfigError: If ``cache`` is neither, or the number of bytes is none.
        ServeError: If the workers have no such extension, or cannot be reached, or cannot mix.
    """

    def __init__(
        self,
        llm: Any,
        *,
        cache: Cache = "reset",
        mixing: bool = False,
        max_adapter_memory: int | None = None,
    ) -> None:
        super().__init__(llm, cache, threading.RLock)
        self.llm = llm
        self.list()
        if max_adapter_memory is not None:
            self.limit(max_adapter_memory)
        if mixing:
            self.mix()

    @contextmanager
    def using(self, weights: Weights, scale: float = 1.0) -> Iterator[None]:
        """Make adapters active for a while, and then what was."""
        before = self.active
        self.activate(weights, scale)
        try:
            yield
        finally:
            self.activate(before)

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *args: Any,
        adapters: Weights | Sequence[Weights] = None,
        **kwargs: Any,
    ) -> Any:
        """Call ``llm.generate`` under the present state, in salt mode with its salt on prompts.

        With ``adapters``, if batches are mixed: the adapters of all prompts, or a list with one
        item for each; None is the base. Each answer is its own adapter's. All of them are in memory
        together.

        Raises:
            AdapterError: If they do not fit together into what `limit` allows; nothing has run.
            UnknownAdapterError: If one was not loaded by a client.
            ServeError: If one cannot ride, or something is active, or batches are not mixed.
        """
        with self._lock, ExitStack() as stack:
            if adapters is None and self.cache != "salt":
                return self.llm.generate(prompts, sampling_params, *args, **kwargs)
            each = [prompts] if isinstance(prompts, (str, Mapping)) else [*prompts]
            if adapters is not None:
                self._check_base()
                given = sampling_params or self.llm.get_default_sampling_params()
                parameters = [given] * len(each) if not isinstance(given, Sequence) else [*given]
                brought: list[Weights] = (
                    [adapters] * len(each) if isinstance(adapters, (str, Mapping)) else [*adapters]
                )
                if not len(each) == len(parameters) == len(brought):
                    raise ConfigError(
                        f"{len(each)} prompts need as many adapters and sampling parameters, not "
                        f"{len(brought)} and {len(parameters)}"
                    )
                scales = [wanted(weights) for weights in brought]
                for terms in scales:
                    self._check_can_ride(terms)
                names = list(dict.fromkeys(name for terms in scales for name in terms))
                self._room_for(names)
                stack.enter_context(self._shared.riders.aboard(names))
                carried = [self._do(self._carry, terms) for terms in scales]
                for i, own in enumerate(carried):
                    if own is not None:
                        each[i], parameters[i] = own.by(each[i], parameters[i])
                    elif self.cache == "salt":
                        each[i] = salted(each[i], self.salt)
                sampling_params = parameters
            else:
                each = [salted(prompt, self.salt) for prompt in each]
            return self.llm.generate(each, sampling_params, *args, **kwargs)

    def _do(self, change: Change, *arguments: Any) -> Any:
        with self._lock:  # answers are told apart by nothing but their order
            try:
                change(*arguments).send(None)
            except StopIteration as end:
                return end.value
        raise AssertionError(f"{change} waits")

    async def _wake_up(self) -> None:
        await super()._wake_up()
        await self._drop_caches()

    @asynccontextmanager
    async def _alone(self, *, pause: bool = False) -> AsyncIterator[None]:
        if self.llm.llm_engine.has_unfinished_requests():
            raise ServeError("requests are unfinished: wait_for_completion() before switching")
        yield

    async def _answer(self, call: Callable[[], Any]) -> Any:
        core = getattr(getattr(self.llm, "llm_engine", None), "engine_core", None)
        resources = getattr(core, "resources", None)
        if resources is None:  # an engine in this process: it dies with us
            return call()
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=run, name="shira-call", daemon=True).start()
        while not wait([answer], timeout=changes.LOOK).done:
            if resources.engine_dead:
                raise EngineGoneError("it died before it answered")
        return answer.result()


class AsyncClient(
    Changes[
        Coroutine[Any, Any, None],
        Coroutine[Any, Any, dict[str, Any]],
        Coroutine[Any, Any, Sequence[dict[str, Any]]],
    ]
):
    """Adapters of an ``AsyncLLM``, on one event loop.

    Made with ``await AsyncClient.of(engine)``. Methods, arguments and errors are those of `Client`,
    but are awaited. A caller that is cancelled does not stop a change half way.
    """

    _sleep_mode: ClassVar[Mapping[str, str]] = {"mode": "wait"}

    def __init__(self, engine: Any, *, cache: Cache = "reset") -> None:
        super().__init__(engine, cache, asyncio.Lock)
        self.engine = engine
        self._gate = self._shared.gate

    @classmethod
    async def of(
        cls,
        engine: Any,
        *,
        cache: Cache = "reset",
        mixing: bool = False,
        max_adapter_memory: int | None = None,
    ) -> AsyncClient:
        """Return a client that knows what is active in the engine."""
        client = cls(engine, cache=cache)
        await client.list()
        if max_adapter_memory is not None:
            await client.limit(max_adapter_memory)
        if mixing:
            await client.mix()
        return client

    async def why_not(self, weights: Weights) -> str:
        """Return why requests cannot bring these adapters along; empty if they can."""
        self._check_mixing()
        scales = wanted(weights)
        known = self._shared.why_not.get(tuple(scales.items()))
        return str(await self._in_memory(self._why_not, scales)) if known is None else known

    async def check(self, weights: Weights, scale: float = 1.0) -> None:
        """Raise what `activate` would raise, once there is room; nothing changes."""
        await self._in_memory(self._check, wanted(weights, scale))

    async def carry(self, weights: Weights) -> Carried | None:
        """Return what requests bring along to be answered by adapters of their own.

        None for the base. Errors are those of `riding`, which keeps them in memory, too.
        """
        async with self.riding(weights) as own:
            return own

    @asynccontextmanager
    async def riding(self, weights: Weights) -> AsyncIterator[Carried | None]:
        """Keep adapters in memory inside the context, for a request that brings them along.

        Gives what it brings; None for the base. Waits first until there is room for them beside
        those of other requests, behind those who wait already; requests for the base need not wait.
        `generate` does so by itself; others end the request in the engine before they leave.

        Raises:
            AdapterError: If there is not enough room, whatever requests end; if one cannot be read
                again.
            UnknownAdapterError: If one was not loaded by a client.
            ServeError: If one cannot ride, or batches are not mixed.
        """
        if not (scales := wanted(weights)):
            yield None
            return
        self._check_can_ride(scales)
        async with self._aboard(scales):
            yield await self._do(self._carry, scales)

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
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        adapter: Weights = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Run ``engine.generate`` under the state at its start; a switch waits for its end.

        With ``adapter`` as `Client.generate` does with one prompt, but that it waits for room; see
        `riding`.
        """
        async with self._gate.using(None):
            if adapter is not None:
                self._check_base()
            async with self.riding(adapter) as own:
                if own is not None:
                    prompt, sampling_params = own.by(prompt, sampling_params)
                elif self.cache == "salt":
                    prompt = salted(prompt, self.salt)
                outputs = self.engine.generate(prompt, sampling_params, request_id, **kwargs)
                async with aclosing(outputs):  # a request that was given up is out of the engine
                    async for output in outputs:
                        yield output

    @asynccontextmanager
    async def _aboard(self, names: Collection[str]) -> AsyncIterator[None]:
        riders = self._shared.riders
        with ExitStack() as stack:
            async with riders.first(names):
                while True:
                    async with self._lock:  # nothing is dropped meanwhile
                        if self._room_for(names):
                            stack.enter_context(riders.aboard(names))
                            break
                    await riders.change()
            yield

    async def _in_memory(self, change: Change, scales: Mapping[str, float]) -> Any:
        async with self._gate.using(None), self._aboard(scales):
            return await self._do(change, scales)

    async def _load_by(self, name: str, path: str | None, compare: bool) -> dict[str, Any]:
        """Load in a thread of each worker; requests go on, and so do other changes."""
        while self._shared.loading:
            await self._give_way(_LOOK_AT_LOAD[0])
        self._shared.loading = True
        try:
            await self._call("shira_begin_load", name, path, compare)
            wait, longest = _LOOK_AT_LOAD
            while not all(each["ready"] for each in await self._call("shira_load_ready")):
                await self._give_way(wait)
                wait = min(2 * wait, longest)
            return (await self._call("shira_end_load", *self._kept()))[0]
        finally:
            self._shared.loading = False

    async def _give_way(self, seconds: float) -> None:
        """Wait, and let other changes be made meanwhile."""
        self._lock.release()
        try:
            await asyncio.sleep(seconds)
        finally:
            await self._lock.acquire()

    async def _bring_back(self, names: Iterable[str]) -> None:
        for name in names:
            while name in self._on_disk:
                if self._shared.loading:  # perhaps it
                    await self._give_way(_LOOK_AT_LOAD[0])
                else:
                    await self._load_by(name, None, True)

    async def _do(self, change: Change, *arguments: Any) -> Any:  # type: ignore[override]
        async def locked() -> Any:
            async with self._lock:
                return await change(*arguments)

        return await asyncio.shield(asyncio.ensure_future(locked()))

    @asynccontextmanager
    async def _alone(self, *, pause: bool = False) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            self._lock.release()  # who has to end first may need it
            try:
                await stack.enter_async_context(self._gate.alone())
            finally:
                await self._lock.acquire()
            if pause:
                await stack.enter_async_context(self._paused())
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
