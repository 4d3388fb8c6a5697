# SPDX-License-Identifier: Apache-2.0
"""What an engine held, as plain values and as a file, so that a new engine can be given the same.

A `Record` names adapters by the path and the digest with which they were loaded, and says what was
active. The journal is its file: JSON, replaced as a whole (`shira.store.atomic`), so that whoever
reads it finds the state before a change or after it::

    {"shira_journal": 1,
     "adapters": {"french": {"path": "french", "digest": "0e57..."}, ...},
     "combinations": {"mix": {"french": 0.5, "german": 0.5}},
     "active": {"french": 1.0}}

`shira.serve.restoring` gives it back to an engine. Knows no engine itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from shira.errors import FileFormatError
from shira.store.atomic import write_atomically
from shira.store.json_text import parse_object

_FORMAT = "shira_journal"
_VERSION = 1


class Kept(NamedTuple):
    """An adapter that was loaded from a file."""

    path: str
    """Where from, as who loaded it put it."""
    digest: str
    """Hash of its names, shapes, positions and values, as the engine reported it."""


@dataclass(frozen=True)
class Record:
    """What an engine holds.

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
        OSError: If it cannot be written; the old file is still there.
    """
    value = {
        _FORMAT: _VERSION,
        "adapters": {name: kept._asdict() for name, kept in record.adapters.items()},
        "combinations": {name: dict(terms) for name, terms in record.combinations.items()},
        "active": dict(record.active),
    }
    write_atomically(path, json.dumps(value, indent=1).encode())


def read(path: str | os.PathLike[str]) -> Record:
    """The record in a file; an empty one if there is no file yet.

    Raises:
        FileFormatError: If the file is no journal.
        OSError: If it cannot be read.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return Record()
    value = parse_object(raw, path, "journal")
    if value.get(_FORMAT) != _VERSION:
        _refuse(path, f'"{_FORMAT}" is {value.get(_FORMAT)!r}, not {_VERSION}')
    return Record(
        {name: _kept(path, name, kept) for name, kept in _table(path, value, "adapters").items()},
        {
            name: _scales(path, name, terms)
            for name, terms in _table(path, value, "combinations").items()
        },
        _scales(path, "active", value.get("active")),
    )


def _table(path: str | os.PathLike[str], value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        _refuse(path, f'"{key}" is {found!r:.80}, not an object')
    return found


def _kept(path: str | os.PathLike[str], name: str, value: Any) -> Kept:
    if not isinstance(value, dict) or set(value) != set(Kept._fields):
        _refuse(path, f"adapter {name!r} is {value!r:.80}, not a path and a digest")
    if not all(isinstance(each, str) for each in value.values()):
        _refuse(path, f"path and digest of adapter {name!r} are texts, unlike {value!r:.80}")
    return Kept(**value)


def _scales(path: str | os.PathLike[str], name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        _refuse(path, f"{name!r} is {value!r:.80}, not scales by name")
    for scale in value.values():
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not math.isfinite(scale):
            _refuse(path, f"a scale in {name!r} is {scale!r:.80}, not a number")
    return {key: float(scale) for key, scale in value.items()}


def _refuse(path: str | os.PathLike[str], what: str) -> NoReturn:
    raise FileFormatError(
        f"{os.fspath(path)} is no journal of adapters: {what}. Move it away to begin without"
    )
