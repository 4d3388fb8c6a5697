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

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from shira.errors import ServeError
from shira.serve.async_client import AsyncClient
from shira.serve.journal import Kept, Record
from shira.serve.reports import Reports, checked, located, named, salted, slept, wanted
from shira.serve.restoring import drive, steps
from shira.serve.shared import NO_RESET, Cache, Weights, policy, shared_of
from shira.serve.watch import unreachable, watched

__all__ = ["AsyncClient", "Cache", "Client", "Weights"]

T = TypeVar("T")


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
        self.cache = policy(cache)
        self._shared = shared_of(llm, threading.RLock)
        self._lock = self._shared.lock
        self._call("shira_list")

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
        """What was loaded through clients of this engine, and is active; there without it too.

        `shira.serve.journal` writes it to a file and reads it. Values that a `ValueSender` sent are
        not in it: the adapter's file has those of before.
        """
        return self._shared.record()

    def restore(self, record: Record) -> None:
        """Load and activate in this engine, a new one, what another held.

        Raises:
            RestoreError: If files are gone or have changed since, each of them named; the others
                are there, and the base is active if what was active could not be made so.
            ServeError: If this engine is lost, too.
        """
        do: dict[str, Callable[..., Any]]
        do = {"load": self.load, "unload": self.unload, "activate": self.activate}
        drive(steps(replace(record, combinations={})), lambda kind, *args: do[kind](*args))

    def load(self, name: str, path: str, *, compare: bool = True) -> dict[str, Any]:
        """Let every worker hold the adapter at a path; returns what rank 0 said of it.

        Raises:
            ShiraError: As `ShiraWorkerExtension.shira_load` says; no worker holds it then.
            FileNotFoundError: If there is nothing at the path.
        """
        name, path = named(name), located(path)
        said = self._call("shira_load", name, path, bool(compare)).first
        self._shared.kept[name] = Kept(path, said["digest"])
        return said

    def unload(self, name: str) -> None:
        """Let every worker forget an adapter that is not active."""
        self._call("shira_unload", named(name))
        self._shared.kept.pop(name, None)

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
            AdapterError: If a name or a scale is none; see `shira.delta.checked_scale`.
            ServeError: If requests are unfinished, or the caches could not be dropped.
            ShiraError: As `ShiraWorkerExtension.shira_activate` says. Nothing has changed.
        """
        which = wanted(weights, scale)
        with self._lock:
            self._check_idle()
            said = self._call("shira_activate", which)
            if self.cache == "reset" and not self._drop_caches():
                self._call("shira_activate", said.first["previous"])
                raise ServeError(NO_RESET)

    def check(self, weights: Weights, scale: float = 1.0) -> None:
        """Raise what `activate` would raise of these adapters and scales; nothing changes."""
        self._call("shira_check", wanted(weights, scale))

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
        level = slept(level)
        with self._lock:
            self._check_idle()
            self._call("shira_sleep", level)
            self._shared.discarded = level >= 2
            self._ask("sleep", lambda: self.llm.sleep(level=level))

    def wake_up(self) -> None:
        """``llm.wake_up``, after level 2 with the weights reloaded before any request runs."""
        with self._lock:
            if self._shared.discarded:
                self._ask("wake_up", lambda: self.llm.wake_up(tags=["weights"]))
                self._ask("reload_weights", lambda: self.llm.collective_rpc("reload_weights"))
                self._call("shira_rebase")
                self._shared.discarded = False
            self._ask("wake_up", self.llm.wake_up)
            self._drop_caches()

    def _check_idle(self) -> None:
        if self.llm.llm_engine.has_unfinished_requests():
            raise ServeError("requests are unfinished: wait_for_completion() before switching")

    def _drop_caches(self) -> bool:
        self._ask("reset_encoder_cache", self.llm.llm_engine.reset_encoder_cache)
        reset = self.llm.reset_prefix_cache
        return bool(self._ask("reset_prefix_cache", lambda: reset(reset_connector=True)))

    def _call(self, method: str, *args: Any) -> Reports:
        with self._lock:  # answers are told apart by nothing but their order
            answers = self._ask(method, lambda: self.llm.collective_rpc(method, args=args))
            self._shared.reports = checked(answers, method)
            return self._shared.reports

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            return watched(self.llm, call)
        except Exception as error:
            raise unreachable(what, error) from error
