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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from shira.errors import ServeError
from shira.serve import changes
from shira.serve.async_client import AsyncClient
from shira.serve.changes import Cache, Changes, EngineGoneError
from shira.serve.journal import Record
from shira.serve.messages import Weights, salted

__all__ = ["AsyncClient", "Cache", "Client", "Weights"]

T = TypeVar("T")


class Client(Changes):
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

    def restore(self, record: Record) -> None:
        """Load and activate in this engine, a new one, what another held.

        Raises:
            RestoreError: If files are gone or have changed since, each of them named; the others
                are there, and the base is active if what was active could not be made so.
            ServeError: If this engine is lost, too.
        """
        self._do(self._restore(record))

    def load(self, name: str, path: str, *, compare: bool = True) -> dict[str, Any]:
        """Let every worker hold the adapter at a path; returns what rank 0 said of it.

        Raises:
            ShiraError: As `ShiraWorkerExtension.shira_load` says; no worker holds it then.
            FileNotFoundError: If there is nothing at the path.
        """
        return self._do(self._load(name, path, compare))

    def unload(self, name: str) -> None:
        """Let every worker forget an adapter that is not active."""
        self._do(self._unload(name))

    def list(self) -> dict[str, Any]:
        """Return what rank 0 holds: ``adapters``, ``active``, ``state``."""
        return self._do(self._list())

    def fingerprint(self) -> Sequence[dict[str, Any]]:
        """Return, for each rank, hashes of its weights: ``base``, and as they are."""
        return self._do(self._call("shira_fingerprint"))

    def activate(self, weights: Weights, scale: float = 1.0) -> None:
        """Make adapters active on all ranks, in place of those that are.

        Args:
            weights: A name, ``{name: scale, ...}``, or None for the base.
            scale: With a single name, its factor.

        Raises:
            AdapterError: If a name or a scale is none; see `shira.delta.checked_scale`.
            ServeError: If requests are unfinished, or the caches could not be dropped.
            ShiraError: As `ShiraWorkerExtension.shira_activate` says. Nothing has changed.
        """
        self._do(self._activate(weights, scale))

    def check(self, weights: Weights, scale: float = 1.0) -> None:
        """Raise what `activate` would raise of these adapters and scales; nothing changes."""
        self._do(self._check(weights, scale))

    def deactivate(self) -> None:
        """Make the base active again, bit for bit; raises as `activate`."""
        self.activate(None)

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

    def sleep(self, level: int = 1) -> None:
        """Call ``llm.sleep``. Loaded adapters and what is active survive both levels.

        At level 1 vLLM keeps the weights, with what is active in them; at level 2 it drops them,
        and `wake_up` loads the base anew and applies what was active.
        """
        self._do(self._sleep(level))

    def wake_up(self) -> None:
        """Call ``llm.wake_up``, after level 2 with the weights reloaded before any request runs."""
        with self._lock:
            self._do(self._wake_up())
            self._do(self._drop_caches())

    def _do(self, change: Coroutine[Any, Any, T]) -> T:
        with self._lock:  # answers are told apart by nothing but their order
            try:
                change.send(None)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
        raise AssertionError(f"{change} waits")

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
