# SPDX-License-Identifier: Apache-2.0
"""`AdapterService`: load, unload, activate and list the adapters of a running engine.

Names are what clients put into the ``model`` field. A name stands for one adapter that was loaded
from a file, or for several with their scales. The `AdapterScheduler` inside decides when each has
its turn; the engine is anything with the four methods of `Engine`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from shira.delta import checked_scale
from shira.errors import (
    AdapterError,
    ServeError,
    ShiraError,
    UnknownAdapterError,
    did_you_mean,
)
from shira.serve.http.names import NameTakenError, adapter_name, below
from shira.serve.scheduler import AdapterScheduler

T = TypeVar("T")


class Engine(Protocol):
    """An engine as the service needs it; `shira.serve.client.AsyncClient` is one."""

    async def load(self, name: str, path: str) -> dict[str, Any]:
        """Hold the adapter at a path under a name; nothing that is served changes.

        What it returns has the adapter's ``digest``.
        """

    async def unload(self, name: str) -> None:
        """Forget an adapter that is not active."""

    async def check(self, weights: Mapping[str, float]) -> None:
        """Raise what `activate` would raise of these scales; nothing changes."""

    async def activate(self, weights: Mapping[str, float] | None) -> None:
        """Make adapters active in place of those that are; on failure nothing has changed.

        Returns once no answer of the weights before can be given any more.
        """


class Served(NamedTuple):
    """An adapter, or several together, under a name."""

    weights: Mapping[str, float]
    """Scale by name of loaded adapters."""
    path: str | None
    """The path it was loaded from, as the client put it; None for several adapters together."""
    report: Mapping[str, Any]
    """The engine's report of it."""


class AdapterService:
    """The adapters that a server knows.

    Args:
        engine: Where they are held.
        folder: Clients' paths lie below it; None: nothing can be loaded over HTTP.
        base_models: Names under which the base is served; the first is its own.
        patience: Of the scheduler.
        taken: Whether a name belongs to something else that the server serves, on the base's
            weights (a LoRA).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        folder: Path | None,
        base_models: Sequence[str],
        patience: float = 0.5,
        taken: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.base_models = tuple(base_models)
        self.scheduler = AdapterScheduler(self._switch, patience=patience)
        self.served: dict[str, Served] = {}
        self._taken = taken
        self._changing = asyncio.Lock()
        self._last_switch: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # the event loop itself keeps them weakly

    def resolve(self, model: object) -> str | None:
        """Return the adapter that a ``model`` field names; None: the base, or what else is served.

        Raises:
            UnknownAdapterError: If it is nothing that is served.
        """
        if model is None or model == "" or model in self.base_models:
            return None
        if isinstance(model, str) and model in self.served:
            return model
        if isinstance(model, str) and self._taken(model):
            return None
        shown = model if isinstance(model, str) else type(model).__name__
        hint = did_you_mean(shown, [*self.base_models, *self.served])
        raise self._unknown(model, f"The model `{shown:.300}` does not exist.{hint}")

    async def load(
        self, name: object, path: object = None, adapters: object = None
    ) -> dict[str, Any]:
        """Serve an adapter from a file, or several loaded ones together, under a name.

        As with `unload`, a caller that is cancelled does not stop it half way.

        Args:
            name: A free name; see `adapter_name`.
            path: Below the folder of adapters.
            adapters: Instead of a path: ``{name: scale, ...}`` of adapters loaded before.

        Raises:
            AdapterError: If arguments are unusable, or the adapter does not fit the model.
            NameTakenError: If the name stands for something already.
            PathRefusedError: If the path leads out of the folder.
            FileNotFoundError: If nothing is there.
            FileFormatError: If what is there is no adapter.
            ServeError: If the server has no folder of adapters.
        """
        return await self._whole(self._load(name, path, adapters))

    async def _load(self, name: object, path: object, adapters: object) -> dict[str, Any]:
        name = adapter_name(name)
        if (path is None) == (adapters is None):
            raise AdapterError('give either "path" or "adapters"')
        async with self._changing:
            if name in self.served or name in self.base_models or self._taken(name):
                raise NameTakenError(f"{name!r} is served already; unload it, or choose another")
            if adapters is not None:
                weights = self._combination(adapters)
                await self.engine.check(weights)
                self.served[name] = Served(weights, None, {})
            else:
                if self.folder is None:
                    raise ServeError(
                        "this server was given no folder of adapters, so it loads none"
                    )
                real = await asyncio.to_thread(below, self.folder, path)
                try:
                    report = await self.engine.load(name, str(real))
                except (ShiraError, OSError) as error:
                    # clients hear of the folder's inside, not of where it is
                    told = str(error).replace(f"{self.folder.resolve()}/", "")
                    known = isinstance(error, ShiraError | FileNotFoundError)
                    raise (type(error) if known else AdapterError)(told) from error
                self.served[name] = Served({name: 1.0}, str(path), report)
            return self._described(name)

    async def unload(self, name: object) -> dict[str, Any]:
        """Serve a name no longer: running requests end first, queued ones are refused.

        Raises:
            UnknownAdapterError: If it is not served.
            NameTakenError: If others are made of it.
        """
        return await self._whole(self._unload(name))

    async def _unload(self, name: object) -> dict[str, Any]:
        async with self._changing:
            served = self._served(name)
            users = [n for n, other in self.served.items() if name in other.weights and n != name]
            if users:
                raise NameTakenError(f"{name!r} is part of {', '.join(users)}: unload those first")
            described = self._described(str(name))
            async with self.scheduler.alone():
                if self.scheduler.active == name:
                    await self.engine.activate(None)
                    self.scheduler.assume(None)
                if served.path is not None:
                    await self.engine.unload(str(name))
                del self.served[str(name)]
                self.scheduler.fail(
                    name, UnknownAdapterError(f"the model `{name}` was unloaded meanwhile")
                )
            return described

    async def activate(self, name: object) -> dict[str, Any]:
        """Switch now rather than with the next request: wait for the adapter's turn.

        Args:
            name: A served adapter, the base's name, or None for the base.

        Returns:
            ``active``, ``seconds`` in all, ``switch_seconds`` of the switch itself, None if the
            adapter was active already.

        Raises:
            UnknownAdapterError: If it is not served.
            ShiraError: What the engine raised; it goes on with the weights it had.
        """
        adapter = self.resolve(name)
        began, switches = time.perf_counter(), self.scheduler.switches
        async with self.scheduler.using(adapter):
            switched = self.scheduler.switches != switches
            return {
                "active": adapter,
                "seconds": time.perf_counter() - began,
                "switch_seconds": self._last_switch if switched else None,
            }

    def list(self) -> dict[str, Any]:
        """Return what is served, what is active, who waits."""
        return {
            "object": "list",
            "data": [self._described(name) for name in self.served],
            "active": self.scheduler.active,
            "running": self.scheduler.running,
            "waiting": {
                self.base_models[0] if key is None else str(key): count
                for key, count in self.scheduler.waiting.items()
            },
            "switches": self.scheduler.switches,
            "patience_seconds": self.scheduler.patience,
        }

    def _start(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _whole(self, change: Coroutine[Any, Any, T]) -> T:
        """Await a change, which goes on to its end also if the caller is cancelled."""
        return await asyncio.shield(self._start(change))

    async def _switch(self, adapter: str | None) -> None:
        weights = None if adapter is None else self._served(adapter).weights
        began = time.perf_counter()
        await self.engine.activate(weights)
        self._last_switch = time.perf_counter() - began

    def _served(self, name: object) -> Served:
        if not isinstance(name, str) or name not in self.served:
            hint = did_you_mean(str(name), self.served)
            raise self._unknown(name, f"no adapter {name!r:.300} is served.{hint}")
        return self.served[name]

    def _unknown(self, name: object, message: str) -> UnknownAdapterError:
        return UnknownAdapterError(message)

    def _combination(self, adapters: object) -> dict[str, float]:
        if not isinstance(adapters, Mapping) or not adapters:
            raise AdapterError('"adapters" is {name: scale, ...}')
        weights: dict[str, float] = {}
        for name, scale in adapters.items():
            if self._served(name).path is None:
                raise AdapterError(f"{name!r} is several adapters itself; name those")
            weights[name] = checked_scale(name, scale)
        return weights

    def _described(self, name: str) -> dict[str, Any]:
        served = self.served[name]
        return {
            "id": name,
            "object": "adapter",
            "parent": self.base_models[0],
            "path": served.path,
            "adapters": None if served.path is not None else dict(served.weights),
            **{key: value for key, value in served.report.items() if key in _TOLD},
        }


_TOLD = ("digest", "nnz", "parameters")
