# SPDX-License-Identifier: Apache-2.0
"""Drive the adapters of a vLLM engine so that no answer is ever stale or mixed.

`Client` is for ``vllm.LLM``, `AsyncClient` for ``AsyncLLM``; both need the worker extension
``shira.serve.vllm.ShiraWorkerExtension``. `shira.serve.changes` has the steps of each change. With
``cache="salt"`` the prefix cache is not dropped at a switch: each state's blocks are kept apart by
vLLM's ``cache_salt``, so that each finds its own again; then every request must go through
`generate`, which adds the salt.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from shira.errors import ServeError
from shira.serve import changes
from shira.serve.async_client import AsyncClient
from shira.serve.changes import Cache, Change, Changes, EngineGoneError
from shira.serve.messages import Weights, salted

__all__ = ["AsyncClient", "Cache", "Client", "Weights"]


class Client(Changes[None, dict[str, Any], Sequence[dict[str, Any]]]):
    """Adapters of a ``vllm.LLM``.

    Args:
        llm: Made with ``worker_extension_cls="shira.serve.vllm.ShiraWorkerExtension"``.
        cache: ``"reset"`` drops the prefix cache at each switch. ``"salt"`` keeps it, each state's
            own; every request must then go through `generate`.

    Raises:
        ConfigError: If ``cache`` is neither.
        ServeError: If the workers have no such extension, or cannot be reached.
    """

    def __init__(self, llm: Any, *, cache: Cache = "reset") -> None:
        super().__init__(llm, cache, threading.RLock)
        self.llm = llm
        self.list()

    @contextmanager
    def using(self, weights: Weights, scale: float = 1.0) -> Iterator[None]:
        """Make adapters active for a while, and then what was."""
        before = self.active
        self.activate(weights, scale)
        try:
            yield
        finally:
            self.activate(before)

    def generate(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``llm.generate`` under the present state, in salt mode with its salt on prompts."""
        with self._lock:
            if self.cache == "salt":
                single = isinstance(prompts, (str, Mapping))
                each = [prompts] if single else prompts
                prompts = [salted(prompt, self.salt) for prompt in each]
            return self.llm.generate(prompts, *args, **kwargs)

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
