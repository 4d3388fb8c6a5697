# SPDX-License-Identifier: Apache-2.0
"""`AdapterService`: load, unload, activate and list the adapters of a running engine.

Names are what clients put into the ``model`` field. A name stands for one adapter that was loaded
from a file, or for several with their scales. The `AdapterScheduler` inside decides when each has
its turn.

With a journal (`shira.serve.journal`) the adapters outlive the engine and the server process. A
change through the routes is in it before it is answered; a switch that a request made follows in
the background. A new server process restores it before it takes requests. A name that cannot be
restored stays known, with the reason, which requests for it are told, until it is loaded again or
unloaded. A journal that cannot be read is set aside, under a name beside it that the log and the
list tell, and a new one is begun.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from shira.delta import checked_scale
from shira.errors import (
    AdapterError,
    FileFormatError,
    RestoreError,
    ServeError,
    ShiraError,
    UnknownAdapterError,
    did_you_mean,
    shown,
)
from shira.serve import journal as journals
from shira.serve.client import AsyncClient
from shira.serve.http.names import NameTakenError, adapter_name, below
from shira.serve.journal import Kept, Record
from shira.serve.messages import Carried
from shira.serve.scheduler import AdapterScheduler

T = TypeVar("T")

_logger = logging.getLogger(__name__)
_TOLD = ("digest", "nnz", "parameters")  # of the engine's report


class Served(NamedTuple):
    """An adapter, or several together, under a name."""

    weights: Mapping[str, float]  # scale by name of loaded adapters
    path: str | None  # as the client put it; None for several adapters together
    report: Mapping[str, Any]  # the engine's
    rides: bool = False  # batches are mixed, and its requests bring it along
    why_not: str = ""  # if they are and it cannot ride


class AdapterService:
    """The adapters that a server knows, and with a journal knows again after a restart.

    Args:
        engine: Holds them; only its ``load``, ``unload``, ``check`` and ``activate`` are called,
            and with mixing its ``why_not`` and ``riding``.
        folder: Clients' paths lie below it; None: nothing can be loaded over HTTP.
        base_models: Names under which the base is served; the first is its own.
        patience: Of the scheduler.
        taken: True of a name that belongs to something else that the server serves, on the base's
            weights (a LoRA).
        journal: The file; it is read by `restore` and not written before.
        mixing: The engine mixes adapters in a batch: requests for those that can ride wait for no
            turn but the base's, and bring their adapter along.
    """

    def __init__(
        self,
        engine: AsyncClient,
        *,
        folder: Path | None,
        base_models: Sequence[str],
        patience: float = 0.5,
        taken: Callable[[str], bool] = lambda name: False,
        journal: Path | None = None,
        mixing: bool = False,
    ) -> None:
        self.engine = engine
        self.folder = folder
        self.base_models = tuple(base_models)
        self.scheduler = AdapterScheduler(self._switch, patience=patience)
        self.served: dict[str, Served] = {}
        self.mixing = mixing
        self._running: Counter[str] = Counter()  # requests that brought an adapter along
        self._ended = asyncio.Event()
        self._taken = taken
        self._changing = asyncio.Lock()
        self._last_switch: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # the event loop itself keeps them weakly
        self.journal = journal
        self.lost: dict[str, str] = {}  # why a name that was served before could not be restored
        self.set_aside: dict[str, str] | None = None  # name of the file, and why it was set aside
        self._before: Record | None = None  # what the journal said at the start, once restored
        self._written: Record | None = None
        self._writing = asyncio.Lock()
        engine.waiting = self._waited_for

    def resolve(self, model: object) -> str | None:
        """Return the adapter that a ``model`` field names; None: the base (or a LoRA on it)."""
        if model is None or model == "" or model in self.base_models:
            return None
        if isinstance(model, str) and model in self.served:
            return model
        if isinstance(model, str) and self._taken(model):
            return None
        said = model if isinstance(model, str) else type(model).__name__
        hint = did_you_mean(said, [*self.base_models, *self.served])
        raise self._unknown(model, f"The model `{said:.300}` does not exist.{hint}")

    @contextmanager
    def riding(self, name: str | None) -> Iterator[Mapping[str, float] | None]:
        """Keep what a request brings along from being unloaded; None if it waits for its turn."""
        served = None if name is None else self.served[name]
        if served is None or not served.rides:
            yield None
            return
        names = {str(name), *served.weights}
        self._running.update(names)
        try:
            yield served.weights
        finally:
            self._running.subtract(names)
            self._ended.set()

    @asynccontextmanager
    async def carrying(
        self, weights: Mapping[str, float], *, unless: asyncio.Future[Any]
    ) -> AsyncIterator[Carried | None]:
        """Have what a request brings along in memory; None if ``unless`` is done sooner.

        For use inside `riding`, and inside the base's turn.
        """
        async with AsyncExitStack() as stack:
            riding = stack.enter_async_context(self.engine.riding(weights))
            entering = asyncio.ensure_future(riding)
            try:
                await asyncio.wait({entering, unless}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not entering.done():
                    entering.cancel()
                    await asyncio.wait({entering})
            try:
                carried = None if entering.cancelled() else entering.result()
            except ShiraError as error:  # such as a file that cannot be read again
                raise self._told(error) from error
            yield carried

    async def load(
        self, name: object, path: object = None, adapters: object = None
    ) -> dict[str, Any]:
        """Serve an adapter from a file, or several loaded ones together, under a name.

        As with `unload`, a caller that is cancelled does not stop it half way. Nothing is loaded if
        the journal cannot be written.

        Args:
            name: A free name; see `adapter_name`.
            path: Below the folder of adapters.
            adapters: Instead of a path: ``{name: scale, ...}`` of adapters loaded before.
        """
        return await self._whole(self._load(name, path, adapters))

    async def _load(
        self, name: object, path: object = None, adapters: object = None
    ) -> dict[str, Any]:
        name = adapter_name(name)
        if (path is None) == (adapters is None):
            raise AdapterError('give either "path" or "adapters"')
        async with self._changing:
            if name in self.served or name in self.base_models or self._taken(name):
                raise NameTakenError(f"{name!r} is served already; unload it, or choose another")
            if adapters is not None:
                weights = self._combination(adapters)
                try:
                    await self.engine.check(weights)
                except ShiraError as error:  # such as a file that cannot be read again
                    raise self._told(error) from error
                self.served[name] = await self._riding(Served(weights, None, {}))
            else:
                report = await self._loaded(name, path)
                try:
                    served = await self._riding(Served({name: 1.0}, str(path), report))
                except BaseException:
                    await self.engine.unload(name)
                    raise
                self.served[name] = served
            described = self._described(name)
        lost = self.lost.pop(name, None)
        try:
            await self._write()
        except ServeError:
            await self._forget(name)
            if lost is not None:
                self.lost[name] = lost
            raise
        return described

    async def _loaded(self, name: str, path: object) -> dict[str, Any]:
        if self.folder is None:
            raise ServeError("this server was given no folder of adapters, so it loads none")
        real = await asyncio.to_thread(below, self.folder, path)
        try:
            return await self.engine.load(name, str(real))
        except (ShiraError, OSError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """Return the error as clients hear it: of the folder's inside, not of where it is."""
        told = str(error).replace(f"{self.folder.resolve()}/" if self.folder else "", "")
        known = isinstance(error, ShiraError | FileNotFoundError)
        return (type(error) if known else AdapterError)(told)

    async def _riding(self, served: Served) -> Served:
        if not self.mixing:
            return served
        why_not = await self.engine.why_not(served.weights)
        return served._replace(rides=not why_not, why_not=why_not)

    async def unload(self, name: object) -> dict[str, Any]:
        """Serve a name no longer: running requests end first, queued ones are refused.

        A name that was lost is forgotten, too; one that others are made of is refused.
        """
        return await self._whole(self._unload(name))

    async def _unload(self, name: object) -> dict[str, Any]:
        if isinstance(name, str) and name in self.lost and name not in self.served:
            described = {"id": name, "object": "adapter", "not_restored": self.lost.pop(name)}
        else:
            described = await self._forget(name)
        await self._write()
        return described

    async def _forget(self, name: object) -> dict[str, Any]:
        async with self._changing:
            served = self._served(name)
            users = [n for n, other in self.served.items() if name in other.weights and n != name]
            if users:
                raise NameTakenError(f"{name!r} is part of {', '.join(users)}: unload those first")
            described = self._described(str(name))
            if served.rides:
                await self._forget_riding(str(name), served)
                return described
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

    async def _forget_riding(self, name: str, served: Served) -> None:
        del self.served[name]  # no more of them
        try:
            while self._running[name]:
                self._ended.clear()
                await self._ended.wait()
            if served.path is not None:
                await self.engine.unload(name)
        except BaseException:
            self.served[name] = served
            raise

    async def activate(self, name: object) -> dict[str, Any]:
        """Switch now rather than with the next request: wait for the adapter's turn.

        Returns ``active``, ``seconds`` in all, ``switch_seconds`` of the switch itself, None if the
        adapter was active already, or requests bring it along.
        """
        adapter = self.resolve(name)
        began, switches = time.perf_counter(), self.scheduler.switches
        with self.riding(adapter) as weights:
            turn = adapter if weights is None else None
        async with self.scheduler.using(turn):
            switched = self.scheduler.switches != switches
            said = {
                "active": adapter,
                "seconds": time.perf_counter() - began,
                "switch_seconds": self._last_switch if switched else None,
            }
        await self._whole(self._write())
        return said

    def list(self) -> dict[str, Any]:
        """Return what is served, what is active, who waits; with a journal, what it lacks."""
        listed = {
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
        if self.mixing:
            listed["riding"] = {name: count for name, count in self._running.items() if count}
        if self.journal is not None:
            listed |= {"not_restored": dict(self.lost), "journal_set_aside": self.set_aside}
        return listed

    def record(self) -> Record:
        """Return what the journal should say now; what was lost is still in it."""
        before = self._before or Record()
        adapters = {n: kept for n, kept in before.adapters.items() if n in self.lost}
        combinations = {n: terms for n, terms in before.combinations.items() if n in self.lost}
        active: Mapping[str, float] = {}
        for name, served in self.served.items():
            if served.path is None:
                combinations[name] = served.weights
            else:
                adapters[name] = Kept(served.path, served.report["digest"])
            if name == self.scheduler.active:
                active = served.weights
        return Record(adapters, combinations, active)

    async def restore(self) -> dict[str, str]:
        """Serve what the journal says, before any request; returns why what could not be.

        `ServeError` if the engine is lost, or the journal cannot be written or set aside.
        """
        before = await asyncio.to_thread(self._read)
        if before.adapters and self.folder is None:
            raise ServeError(
                f"the journal {self.journal} has adapters, but this server was given no folder of "
                "adapters"
            )
        failed: dict[str, str] = {}
        try:
            await journals.restore(before, self._restore_step)
        except RestoreError as error:
            failed = {name: str(why) for name, why in error.failed.items()}
        names = {*before.adapters, *before.combinations}
        self.lost = {name: why for name, why in failed.items() if name in names}
        self._before = before
        await self._write()  # now, so that a file that cannot be written is known at the start
        return failed

    async def _restore_step(self, kind: str, *arguments: Any) -> Any:
        if kind == "load":
            return await self._load(*arguments)
        if kind == "combine":
            return await self._load(arguments[0], adapters=arguments[1])
        if kind == "unload":
            return await self._forget(*arguments)
        (weights,) = arguments
        if not weights:
            return await self.engine.activate(None)
        name = next((n for n, served in self.served.items() if served.weights == weights), None)
        if name is None:
            raise UnknownAdapterError(f"no name is served for {dict(weights)}")
        return await self.activate(name)

    def _read(self) -> Record:
        assert self.journal is not None
        try:
            return journals.read(self.journal)
        except (FileFormatError, OSError) as error:
            why = str(error).replace(f"{self.journal.parent}/", "")
        try:
            aside = journals.set_aside(self.journal)
        except OSError as error:
            raise ServeError(
                f"the journal {self.journal} can neither be read nor be set aside "
                f"({error.strerror}): {why}"
            ) from error
        self.set_aside = {"file": aside.name, "why": why}
        _logger.warning(
            "the journal cannot be read (%s): it is kept as %s, and no adapter is restored",
            shown(why),
            shown(aside),
        )
        return Record()

    async def _write(self) -> None:
        """Bring the journal up to date; whoever waited meanwhile finds it done."""
        if self.journal is None or self._before is None:
            return
        async with self._writing:
            record = self.record()
            if record == self._written:
                return
            try:
                await asyncio.to_thread(journals.write, self.journal, record)
            except OSError as error:
                self._written = None
                raise ServeError(
                    f"the journal {self.journal.name} cannot be written ({error.strerror}): after "
                    "a restart the server would not be as it is now"
                ) from error
            self._written = record

    async def _follow(self) -> None:
        try:
            await self._write()
        except ServeError as error:
            _logger.warning("%s", shown(error))

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
        try:
            await self.engine.activate(weights)
        except ShiraError as error:  # such as a file that cannot be read again
            raise self._told(error) from error
        self._last_switch = time.perf_counter() - began
        if self.journal is not None:
            # The scheduler takes it for active once this has returned, before the task begins.
            self._start(self._follow())

    def _waited_for(self) -> set[str]:
        """Return the adapters that requests wait for."""
        names = [name for name in self.scheduler.waiting if name in self.served]
        return {adapter for name in names for adapter in self.served[str(name)].weights}

    def _served(self, name: object) -> Served:
        if not isinstance(name, str) or name not in self.served:
            hint = did_you_mean(str(name), self.served)
            raise self._unknown(name, f"no adapter {name!r:.300} is served.{hint}")
        return self.served[name]

    def _unknown(self, name: object, message: str) -> UnknownAdapterError:
        if isinstance(name, str) and name in self.lost:
            message = (
                f"The model `{name}` could not be restored when the server was started again: "
                f"{self.lost[name]}"
            )
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
        mixing = {"rides": served.rides, "why_not": served.why_not or None}
        return {
            "id": name,
            "object": "adapter",
            "parent": self.base_models[0],
            "path": served.path,
            "adapters": None if served.path is not None else dict(served.weights),
            **(mixing if self.mixing else {}),
            **{key: value for key, value in served.report.items() if key in _TOLD},
        }
