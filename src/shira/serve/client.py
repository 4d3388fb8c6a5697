# SPDX-License-Identifier: Apache-2.0
"""Drive the adapters of a vLLM engine so that no answer is ever stale or mixed.

vLLM invalidates nothing when weights change: blocks of its prefix cache that the old weights filled
answer for the new ones. A switch here is therefore: wait until no request runs (new ones queue),
switch all ranks or none, drop the caches and check that vLLM did, go on. Where the caches cannot be
dropped the switch is taken back. With ``cache="salt"`` each state's blocks are kept apart by vLLM's
``cache_salt`` instead, so that each finds its own again; then every request must go through
`generate`, which adds the salt.

`Client` is for ``vllm.LLM``, `AsyncClient` for ``AsyncLLM``; both need the worker extension
``shira.serve.vllm.ShiraWorkerExtension``. Imports nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Literal, TypeAlias

from shira.errors import ConfigError, ServeError
from shira.serve.gate import Gate
from shira.serve.reports import Reports, checked, salted, wanted

Weights: TypeAlias = "str | Mapping[str, float] | None"
"""What shall be active: a name, ``{name: scale, ...}``, or None for the base."""

Cache: TypeAlias = Literal["reset", "salt"]

_NO_RESET = (
    "vLLM did not drop its prefix cache (blocks are in use), so old weights would have answered "
    "for new ones; the switch was taken back"
)


class Client:
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
        self.llm = llm
        self.cache = _cache(cache)
        self._lock = _lock_of(llm, threading.RLock)
        self._discarded = False
        self._reports = self._call("shira_list")

    @property
    def active(self) -> dict[str, float]:
        """What is active: scale by name; empty for the base."""
        return dict(self._reports.active)

    @property
    def salt(self) -> str:
        """The ``cache_salt`` of the present state."""
        return self._reports.salt

    def load(self, name: str, path: str, *, compare: bool = True) -> dict[str, Any]:
        """Let every worker hold the adapter at a path; returns what rank 0 said of it.

        Raises:
            ShiraError: As `ShiraWorkerExtension.shira_load` says; no worker holds it then.
            FileNotFoundError: If there is nothing at the path.
        """
        return self._call("shira_load", name, str(path), compare).first

    def unload(self, name: str) -> None:
        """Let every worker forget an adapter that is not active."""
        self._call("shira_unload", name)

    def list(self) -> dict[str, Any]:
        """What rank 0 holds: ``adapters``, ``active``, ``state``."""
        return self._call("shira_list").first

    def fingerprint(self) -> Sequence[dict[str, Any]]:
        """For each rank: hashes of its weights, ``base`` and as they are."""
        return self._call("shira_fingerprint").each

    def activate(self, weights: Weights, scale: float = 1.0) -> None:
        """Make adapters active on all ranks, in place of those that are.

        Args:
            weights: A name, ``{name: scale, ...}``, or None for the base.
            scale: With a single name, its factor.

        Raises:
            ServeError: If requests are unfinished, or the caches could not be dropped.
            ShiraError: As `ShiraWorkerExtension.shira_activate` says. Nothing has changed.
        """
        with self._lock:
            self._check_idle()
            before = self.active
            self._call("shira_activate", wanted(weights, scale))
            if self.cache == "reset" and not self._drop_caches():
                self._call("shira_activate", before)
                raise ServeError(_NO_RESET)

    def deactivate(self) -> None:
        """The base again, bit for bit; raises as `activate`."""
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
        """``llm.generate`` under the present state; in salt mode with its salt on each prompt."""
        with self._lock:
            if self.cache == "salt":
                single = isinstance(prompts, (str, Mapping))
                each = [prompts] if single else prompts
                prompts = [salted(prompt, self.salt) for prompt in each]
            return self.llm.generate(prompts, *args, **kwargs)

    def sleep(self, level: int = 1) -> None:
        """``llm.sleep``. Loaded adapters and what is active survive both levels.

        At level 1 vLLM keeps the weights, with what is active in them; at level 2 it drops them,
        and `wake_up` loads the base anew and applies what was active.
        """
        with self._lock:
            self._check_idle()
            self._call("shira_sleep", level)
            self._discarded = level >= 2
            self.llm.sleep(level=level)

    def wake_up(self) -> None:
        """``llm.wake_up``, after level 2 with the weights reloaded before any request runs."""
        with self._lock:
            if self._discarded:
                self.llm.wake_up(tags=["weights"])
                self.llm.collective_rpc("reload_weights")
                self._call("shira_rebase")
                self._discarded = False
            self.llm.wake_up()
            self._drop_caches()

    def _check_idle(self) -> None:
        if self.llm.llm_engine.has_unfinished_requests():
            raise ServeError("requests are unfinished: wait_for_completion() before switching")

    def _drop_caches(self) -> bool:
        self.llm.llm_engine.reset_encoder_cache()
        return bool(self.llm.reset_prefix_cache(reset_connector=True))

    def _call(self, method: str, *args: Any) -> Reports:
        try:
            answers = self.llm.collective_rpc(method, args=args)
        except Exception as error:
            raise _unreachable(method, error) from error
        self._reports = checked(answers, method)
        return self._reports


class _Pause:
    """Why the engine stays paused afterwards: it was before, or must not run as it is."""

    was = False
    hold = False


class AsyncClient:
    """Adapters of an ``AsyncLLM``; one event loop. Arguments and errors as `Client`.

    Make it with ``await AsyncClient.of(engine)``.
    """

    def __init__(self, engine: Any, *, cache: Cache = "reset") -> None:
        self.engine = engine
        self.cache = _cache(cache)
        self._lock = _lock_of(engine, asyncio.Lock)
        self._gate = Gate()
        self._discarded = False
        self._reports: Reports

    @classmethod
    async def of(cls, engine: Any, *, cache: Cache = "reset") -> AsyncClient:
        """A client that knows what is active in the engine."""
        client = cls(engine, cache=cache)
        await client._call("shira_list")
        return client

    @property
    def active(self) -> dict[str, float]:
        """What is active: scale by name; empty for the base."""
        return dict(self._reports.active)

    @property
    def salt(self) -> str:
        """The ``cache_salt`` of the present state."""
        return self._reports.salt

    async def load(self, name: str, path: str, *, compare: bool = True) -> dict[str, Any]:
        """As `Client.load`; requests go on between its steps."""
        async with self._lock:
            return (await self._call("shira_load", name, str(path), compare)).first

    async def unload(self, name: str) -> None:
        """As `Client.unload`."""
        async with self._lock:
            await self._call("shira_unload", name)

    async def list(self) -> dict[str, Any]:
        """As `Client.list`."""
        async with self._lock:
            return (await self._call("shira_list")).first

    async def fingerprint(self) -> Sequence[dict[str, Any]]:
        """As `Client.fingerprint`."""
        async with self._lock:
            return (await self._call("shira_fingerprint")).each

    async def activate(self, weights: Weights, scale: float = 1.0) -> None:
        """As `Client.activate`, but waits for running requests; new ones queue meanwhile.

        A caller that is cancelled does not stop it half way.
        """
        await asyncio.shield(asyncio.ensure_future(self._switch(wanted(weights, scale))))

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
        async with self._lock, self._gate.alone():
            await self._call("shira_sleep", level)
            self._discarded = level >= 2
            await self.engine.sleep(level=level, mode="wait")

    async def wake_up(self) -> None:
        """As `Client.wake_up`."""
        async with self._lock:
            if self._discarded:
                await self.engine.wake_up(tags=["weights"])
                await self.engine.collective_rpc("reload_weights")
                await self._call("shira_rebase")
                self._discarded = False
            await self.engine.wake_up()

    async def _switch(self, weights: Mapping[str, float]) -> None:
        async with self._lock, self._gate.alone(), self._paused() as pause:
            before = self.active
            await self._call("shira_activate", weights)
            if self.cache == "reset" and not await self._drop_caches():
                pause.hold = True  # no request may run if this fails
                await self._call("shira_activate", before)
                pause.hold = False
                raise ServeError(_NO_RESET)

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[_Pause]:
        """No request runs inside; an engine that was paused before stays so."""
        pause = _Pause()
        try:
            pause.was = await self.engine.is_paused()
            # mode "keep" would let one answer mix two adapters
            await self.engine.pause_generation(mode="wait", clear_cache=False)
        except Exception as error:
            raise _unreachable("pause_generation", error) from error
        try:
            yield pause
        except BaseException:
            with suppress(Exception):  # the first error counts
                if not (pause.was or pause.hold):
                    await self.engine.resume_generation()
            raise
        if not (pause.was or pause.hold):
            await self.engine.resume_generation()

    async def _drop_caches(self) -> bool:
        await self.engine.reset_encoder_cache()
        return bool(await self.engine.reset_prefix_cache(reset_connector=True))

    async def _call(self, method: str, *args: Any) -> Reports:
        try:
            answers = await self.engine.collective_rpc(method, args=args)
        except Exception as error:
            raise _unreachable(method, error) from error
        self._reports = checked(answers, method)
        return self._reports


_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _lock_of(engine: Any, make: Any) -> Any:
    """One lock for all clients of an engine: two switches must not interleave."""
    return _LOCKS.setdefault(engine, make())


def _cache(cache: str) -> Cache:
    if cache not in ("reset", "salt"):
        raise ConfigError(f"cache is 'reset' or 'salt', not {cache!r}")
    return cache  # type: ignore[return-value]  # one of the two


def _unreachable(method: str, error: Exception) -> ServeError:
    if "has no attribute" in str(error):
        return ServeError(
            f"vLLM's workers do not know {method}: start the engine with "
            "worker_extension_cls='shira.serve.vllm.ShiraWorkerExtension'"
        )
    return ServeError(
        f"{method}: vLLM's engine failed ({type(error).__name__}: {error}). If a worker died the "
        "engine is lost and must be started again; its checkpoint on disk was never written"
    )
