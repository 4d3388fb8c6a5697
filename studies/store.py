# SPDX-License-Identifier: Apache-2.0
"""Runs as JSON lines: one run a line with all that describes it, only ever appended to.

Every study has a frozen dataclass for the full configuration of a run, with at least the fields
that `Configuration` names, and a folder of results with one file for each stage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Configuration(Protocol):
    """What the store asks of a run's configuration; all of its fields are plain JSON values."""

    @property
    def stage(self) -> str: ...
    @property
    def protocol(self) -> int: ...
    @property
    def key(self) -> str: ...


R = TypeVar("R", bound=Configuration)


@dataclass(frozen=True)
class Done(Generic[R]):
    """A run that was made, and what came of it."""

    run: R
    result: Mapping[str, Any]


def key_of(configuration: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for a configuration."""
    text = json.dumps(dict(configuration), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(folder: Path, make: Callable[..., R], protocol: int) -> dict[str, Done[R]]:
    """Every run of a protocol, by key. A last line that was cut off is passed over.

    Args:
        folder: holds the ``.jsonl`` files.
        make: makes a configuration of the fields that were written.
        protocol: lines of any other are passed over, whatever their fields.

    Raises:
        ValueError: If a line cannot be read, or its key is not that of its configuration.
    """
    found: dict[str, Done[R]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline: cut
            try:
                entry = json.loads(line)
                if entry["run"]["protocol"] != protocol:
                    continue
                run = make(**entry["run"])
                result = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.name}, line {number}: not a run ({error})") from error
            if entry["key"] != run.key:
                raise ValueError(f"{path.name}, line {number}: key and configuration disagree")
            found.setdefault(run.key, Done(run, result))  # the first counts: no second tries
    return found


def append(
    run: Configuration,
    result: Mapping[str, Any],
    about: Mapping[str, Any],
    folder: Path,
    **derived: Any,
) -> None:
    """Write a finished run at the end of its stage's file, whole or not at all.

    Args:
        run: its configuration.
        result: what came of it.
        about: where and with what it was made.
        folder: where the files are; made if need be.
        derived: values that follow from the configuration, for whoever reads the line.
    """
    entry = {
        "key": run.key,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "run": dict(vars(run)),
        **derived,
        "result": dict(result),
        "environment": dict(about),
    }
    line = json.dumps(entry, allow_nan=False) + "\n"  # before the file is opened: this may raise
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.stage}.jsonl"
    _drop_cut_line(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """A writer that was killed may have left the beginning of a line: it is no run."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
