# SPDX-License-Identifier: Apache-2.0
"""`DurableService`: a service whose adapters outlive the engine and the server process.

What is served and active is kept in a journal (`shira.serve.journal`). A change through the routes
is in it before it is answered; a switch that a request made follows in the background. A new server
process restores it before it takes requests. A name that cannot be restored stays known, with the
reason, which requests for it are told, until it is loaded again or unloaded. A journal that cannot
be read is set aside, under a name beside it that the log and the list tell, and a new one is begun.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shira.errors import FileFormatError, RestoreError, ServeError, UnknownAdapterError, shown
from shira.serve import journal
from shira.serve.http.service import AdapterService
from shira.serve.journal import Kept, Record, restore

_logger = logging.getLogger(__name__)


class DurableService(AdapterService):
    """The adapters that a server knows, and knows again after a restart.

    Args:
        journal: The file.
        **kwargs: Of `AdapterService`.
    """

    def __init__(self, *args: Any, journal: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.journal = journal
        self.lost: dict[str, str] = {}
        """Why a name that was served before could not be restored."""
        self._before = Record()  # what the journal said at the start
        self.set_aside: dict[str, str] | None = None
        """Name of the file, and why it was set aside; None: nothing was."""
        self._written: Record | None = None
        self._writing = asyncio.Lock()

    def record(self) -> Record:
        """Return what the journal should say now; what was lost is still in it."""
        before = self._before
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

        Raises:
            ServeError: If the journal cannot be written or set aside, the engine is lost, or the
                server has no folder of adapters.
        """
        self._before = before = await asyncio.to_thread(self._read)
        if before.adapters and self.folder is None:
            raise ServeError(
                f"the journal {self.journal} has adapters, but this server was given no folder of "
                "adapters"
            )
        self.lost = dict.fromkeys([*before.combinations, *before.adapters], "not yet")
        failed: dict[str, str] = {}
        try:
            await restore(before, self._restore_step)
        except RestoreError as error:
            failed = {name: str(why) for name, why in error.failed.items()}
        self.lost = {name: why for name, why in failed.items() if name in self.lost}
        await self._write()  # now, so that a file that cannot be written is known at the start
        return failed

    async def _load(self, name: object, path: object, adapters: object) -> dict[str, Any]:
        """Load; nothing is loaded if the journal cannot be written."""
        described = await super()._load(name, path, adapters)
        lost = self.lost.pop(str(name), None)
        try:
            await self._write()
        except ServeError:
            await super()._unload(name)
            if lost is not None:
                self.lost[str(name)] = lost
            raise
        return described

    async def _unload(self, name: object) -> dict[str, Any]:
        """Unload; also forgets a name that was lost."""
        lost = self.lost.pop(str(name), None) if str(name) not in self.served else None
        if lost is None:
            described = await super()._unload(name)
        else:
            described = {"id": name, "object": "adapter", "not_restored": lost}
        await self._write()
        return described

    async def activate(self, name: object) -> dict[str, Any]:
        """As `AdapterService.activate`."""
        said = await super().activate(name)
        await self._whole(self._write())
        return said

    def list(self) -> dict[str, Any]:
        """List as `AdapterService` does, with what was not restored and a journal set aside."""
        return {
            **super().list(),
            "not_restored": dict(self.lost),
            "journal_set_aside": self.set_aside,
        }

    def _read(self) -> Record:
        try:
            return journal.read(self.journal)
        except (FileFormatError, OSError) as error:
            why = str(error).replace(f"{self.journal.parent}/", "")
        try:
            aside = journal.set_aside(self.journal)
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

    def _unknown(self, name: object, message: str) -> UnknownAdapterError:
        """Say of a name that was lost why."""
        if isinstance(name, str) and name in self.lost:
            message = (
                f"The model `{name}` could not be restored when the server was started again: "
                f"{self.lost[name]}"
            )
        return super()._unknown(name, message)

    async def _switch(self, adapter: str | None) -> None:
        await super()._switch(adapter)
        # The scheduler takes it for active once this has returned, before the task begins.
        self._start(self._follow())

    async def _follow(self) -> None:
        try:
            await self._write()
        except ServeError as error:
            _logger.warning("%s", shown(error))

    async def _write(self) -> None:
        """Bring the journal up to date; whoever waited meanwhile finds it done."""
        async with self._writing:
            record = self.record()
            if record == self._written:
                return
            try:
                await asyncio.to_thread(journal.write, self.journal, record)
            except OSError as error:
                self._written = None
                raise ServeError(
                    f"the journal {self.journal.name} cannot be written ({error.strerror}): after "
                    "a restart the server would not be as it is now"
                ) from error
            self._written = record

    async def _restore_step(self, kind: str, *arguments: Any) -> Any:
        if kind == "load":
            return await super()._load(arguments[0], arguments[1], None)
        if kind == "combine":
            return await super()._load(arguments[0], None, arguments[1])
        if kind == "unload":
            return await super()._unload(arguments[0])
        (weights,) = arguments
        if not weights:
            return await self.engine.activate(None)
        name = next((n for n, served in self.served.items() if served.weights == weights), None)
        if name is None:
            raise UnknownAdapterError(f"no name is served for {dict(weights)}")
        return await super().activate(name)
