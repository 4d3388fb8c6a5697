# SPDX-License-Identifier: Apache-2.0
"""Calls into an engine that may die meanwhile.

vLLM 0.32 never answers a call that its engine took before it died, so whoever waits for the
answer waits for ever. Here the engine's health is looked at while waiting. Knows of vLLM only the
names of two attributes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any, TypeVar

from shira.errors import ServeError

T = TypeVar("T")

EVERY = 0.25
"""Seconds between two looks at the engine's health; an answer is taken at once."""


class EngineGoneError(Exception):
    """The engine died before it answered."""


def watched(llm: Any, call: Callable[[], T]) -> T:
    """Call into a ``vllm.LLM`` and wait for the answer as long as its engine lives.

    Raises:
        EngineGoneError: If the engine dies meanwhile.
    """
    core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    resources = getattr(core, "resources", None)
    if resources is None:  # an engine in this process: it dies with us
        return call()
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="shira-call", daemon=True).start()
    while True:
        try:
            return answer.result(timeout=EVERY)
        except NotYet:
            if not answer.done() and resources.engine_dead:
                raise EngineGoneError("it died before it answered") from None


async def watched_async(engine: Any, call: Awaitable[T]) -> T:
    """Await a call into an ``AsyncLLM`` as long as it lives.

    Raises:
        EngineGoneError: If the engine dies meanwhile.
    """
    task = asyncio.ensure_future(call)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=EVERY)
            if done:
                return task.result()
            if getattr(engine, "errored", False):
                raise EngineGoneError("it died before it answered")
    finally:
        task.cancel()


def unreachable(method: str, error: Exception) -> ServeError:
    """What to say of an engine that did not answer a call."""
    if "has no attribute" in str(error):
        return ServeError(
            f"vLLM's workers do not know {method}: start the engine with "
            "worker_extension_cls='shira.serve.vllm.ShiraWorkerExtension'"
        )
    return ServeError(
        f"{method}: vLLM's engine failed ({type(error).__name__}: {error}). If a worker died the "
        "engine is lost and must be started again; its checkpoint on disk was never written"
    )
