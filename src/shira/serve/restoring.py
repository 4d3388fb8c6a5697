# SPDX-License-Identifier: Apache-2.0
"""Give a new engine what a `Record` says that the one before it held.

`steps` says what to do next and is told how it went; `drive` and `drive_async` do it with whatever
the engine is (`Client`, `AsyncClient`, a server). An adapter that is gone, damaged or no longer the
one of before is left out and named at the end; the others are restored. Imports no engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

from shira.errors import AdapterError, RestoreError, ServeError, ShiraError
from shira.serve.journal import Record

Step = tuple[str, tuple[Any, ...]]
"""``("load", (name, path))``, ``("unload", (name,))``, ``("combine", (name, weights))`` or
``("activate", (weights,))``."""

Steps = Generator[Step, Any, None]

ACTIVE = "(active)"
"""In the place of a name: what was active could not be made active again."""


def steps(record: Record) -> Steps:
    """What to do, one step after the other; ``load`` is answered with the engine's report.

    Raises:
        RestoreError: At the end, if something could not be restored.
        ServeError: If the engine is lost.
    """
    failed: dict[str, Exception] = {}
    for name, kept in record.adapters.items():
        try:
            report = yield "load", (name, kept.path)
            if report["digest"] != kept.digest:
                yield "unload", (name,)
                raise AdapterError(
                    f"the adapter at {kept.path!r} has changed since it was loaded as {name!r} "
                    f"(digest {report['digest']}, then {kept.digest}); load it again if the new "
                    "one is meant"
                )
        except (ShiraError, OSError) as error:
            if isinstance(error, ServeError):
                yield "activate", ({},)  # raises if it is the engine that failed, not the adapter
            failed[name] = error
    for name, terms in record.combinations.items():
        try:
            _check_there(terms, failed)
            yield "combine", (name, terms)
        except ShiraError as error:
            failed[name] = error
    if record.active:
        try:
            _check_there(record.active, failed)
            yield "activate", (record.active,)
        except ShiraError as error:
            failed[ACTIVE] = error
    if failed:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RestoreError(f"not restored: {told}", failed)


def drive(todo: Steps, do: Callable[..., Any]) -> None:
    """Take the steps; ``do(kind, *arguments)`` takes one."""
    step = _after(todo, None)
    while step is not None:
        outcome: Any
        try:
            outcome = do(step[0], *step[1])
        except Exception as error:
            outcome = error
        step = _after(todo, outcome)


async def drive_async(todo: Steps, do: Callable[..., Awaitable[Any]]) -> None:
    """As `drive`."""
    step = _after(todo, None)
    while step is not None:
        outcome: Any
        try:
            outcome = await do(step[0], *step[1])
        except Exception as error:
            outcome = error
        step = _after(todo, outcome)


def _after(todo: Steps, outcome: Any) -> Step | None:
    """The step that follows what came of the one before; None: there is none."""
    try:
        return todo.throw(outcome) if isinstance(outcome, Exception) else todo.send(outcome)
    except StopIteration:
        return None


def _check_there(terms: Any, failed: dict[str, Exception]) -> None:
    missing = [name for name in terms if name in failed]
    if missing:
        raise AdapterError(f"{', '.join(map(repr, missing))} could not be restored")
