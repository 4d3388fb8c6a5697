# SPDX-License-Identifier: Apache-2.0
"""Record of an engine's adapters, its file, and the steps that give a new engine the same.

A `Record` names adapters by the path and the digest with which they were loaded, and says what was
active. The journal is its file: JSON, replaced as a whole (`shira.store.atomic`), so that whoever
reads it finds the state before a change or after it::

    {"shira_journal": 1,
     "adapters": {"french": {"path": "french", "digest": "0e57..."}, ...},
     "combinations": {"mix": {"french": 0.5, "german": 0.5}},
     "active": {"french": 1.0}}

`restore` gives it to whatever the engine is (`Client`, `AsyncClient`, a server), step by step.
Imports no engine.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shira.delta import checked_scale
from shira.errors import AdapterError, FileFormatError, RestoreError, ServeError, ShiraError
from shira.store.atomic import write_atomically
from shira.store.json_text import read_object

_FORMAT = "shira_journal"
_VERSION = 1
_LARGEST = 16 * 2**20  # bytes

ACTIVE = "(active)"
"""In the place of a name: what was active could not be made active again."""


class Kept(NamedTuple):
    """An adapter that was loaded from a file."""

    path: str
    """The path, as who loaded it put it."""
    digest: str
    """Hash of its names, shapes, positions and values, as the engine reported it."""


@dataclass(frozen=True)
class Record:
    """Adapters and combinations that an engine holds, and which are active.

    Attributes:
        adapters: By name.
        combinations: ``{name: {adapter: scale}}``: names that a server gave to several adapters.
        active: Scale by name of what is in the weights; empty for the base.
    """

    adapters: Mapping[str, Kept] = field(default_factory=dict)
    combinations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    active: Mapping[str, float] = field(default_factory=dict)


def write(path: str | os.PathLike[str], record: Record) -> None:
    """Put a record into its file, in place of the one there.

    Args:
        path: The file. Its folder exists.
        record: What to write.

    Raises:
        AdapterError: If a scale is not a finite number, or a name or path no Unicode text; the old
            file is still there.
        OSError: If it cannot be written, or is larger than `read` takes; the old file is still
            there.
    """
    value = {
        _FORMAT: _VERSION,
        "adapters": {name: kept._asdict() for name, kept in record.adapters.items()},
        "combinations": {name: _scales(name, terms) for name, terms in record.combinations.items()},
        "active": _scales("active", record.active),
    }
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise AdapterError(
            "a name or a path in the record is no Unicode text (lone surrogates)"
        ) from None
    raw = json.dumps(value, indent=1, allow_nan=False).encode()
    if len(raw) > _LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fspath(path))
    write_atomically(path, raw)


def read(path: str | os.PathLike[str]) -> Record:
    """Return the record in a file; an empty one if there is no file yet.

    Raises:
        FileFormatError: If it is no journal, or no regular file of at most 16 MiB.
        OSError: If it cannot be read.
    """
    try:
        value = read_object(path, "journal", _LARGEST)
    except FileNotFoundError:
        return Record()
    try:
        if value.get(_FORMAT) != _VERSION:
            raise ValueError(f'"{_FORMAT}" is {value.get(_FORMAT)!r}, not {_VERSION}')
        return Record(
            {name: _kept(name, kept) for name, kept in _object(value, "adapters").items()},
            {name: _scales(name, terms) for name, terms in _object(value, "combinations").items()},
            _scales("active", value.get("active")),
        )
    except ValueError as error:
        raise FileFormatError(f"{os.fspath(path)} is no journal of adapters: {error}") from None


def set_aside(path: str | os.PathLike[str]) -> Path:
    """Rename what cannot be read to the first free ``<name>.unreadable-<n>`` beside it.

    Args:
        path: A file, a folder, or a link; of a link that leads somewhere, what it leads to.

    Returns:
        The new place; nothing is ever replaced.

    Raises:
        OSError: If it cannot be renamed, or is neither (a pipe, a device).
    """
    place = Path(os.path.realpath(path) if os.path.exists(path) else path)
    mode = os.lstat(place).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise OSError(22, "neither a file nor a folder", os.fspath(path))
    names = (place.with_name(f"{place.name[:200]}.unreadable-{n}") for n in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    place.rename(aside)
    return aside


async def restore(record: Record, do: Callable[..., Awaitable[Any]]) -> None:
    """Give an engine what a record has.

    An adapter that is gone, damaged or no longer the one of before is left out and named at the
    end; the others are restored.

    Args:
        record: What it held.
        do: Takes a step: ``do("load", name, path)``, which returns the engine's report,
            ``do("unload", name)``, ``do("combine", name, weights)`` or ``do("activate", weights)``.

    Raises:
        RestoreError: At the end, if something could not be restored.
        ServeError: If the engine is lost.
    """
    failed: dict[str, Exception] = {}
    for name, kept in record.adapters.items():
        try:
            report = await do("load", name, kept.path)
            if report["digest"] != kept.digest:
                await do("unload", name)
                raise AdapterError(
                    f"the adapter at {kept.path!r} has changed since it was loaded as {name!r} "
                    f"(digest {report['digest']}, then {kept.digest}); load it again to "
                    "have the new one"
                )
        except (ShiraError, OSError) as error:
            if isinstance(error, ServeError):
                await do("activate", {})  # raises if it is the engine that failed, not the adapter
            failed[name] = error
    steps: list[tuple[str, list[str], Mapping[str, float]]] = [
        (name, ["combine", name], terms) for name, terms in record.combinations.items()
    ]
    if record.active:
        steps.append((ACTIVE, ["activate"], record.active))
    for name, step, terms in steps:
        try:
            missing = ", ".join(repr(each) for each in terms if each in failed)
            if missing:
                raise AdapterError(f"{missing} could not be restored")
            await do(*step, terms)
        except ShiraError as error:
            failed[name] = error
    if failed:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RestoreError(f"not restored: {told}", failed)


def _object(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise ValueError(f'"{key}" is {found!r:.80}, not an object')
    return found


def _kept(name: str, value: Any) -> Kept:
    texts = isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    if not texts or set(value) != set(Kept._fields):
        raise ValueError(f"adapter {name!r} is {value!r:.80}, not a path and a digest, two texts")
    return Kept(**value)


def _scales(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise AdapterError(f"{name!r} is {value!r:.80}, not scales by name")
    try:
        return {adapter: checked_scale(adapter, scale) for adapter, scale in value.items()}
    except AdapterError as error:
        raise AdapterError(f"in {name!r}, {error}") from None
