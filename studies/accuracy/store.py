# SPDX-License-Identifier: Apache-2.0
"""results/*.jsonl: one run a line with all that describes it, only ever appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from studies.accuracy.protocol import PROTOCOL, Run

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Done:
    """A run that was made, and what came of it."""

    run: Run
    result: Mapping[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Done]:
    """Every run of this protocol, by key. A last line that was cut off is passed over.

    Raises:
        ValueError: If a line cannot be read, or its key is not that of its configuration.
    """
    found: dict[str, Done] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline: cut
            try:
                entry = json.loads(line)
                if entry["run"]["protocol"] != PROTOCOL:
                    continue
                run = Run(**entry["run"])
                result = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.name}, line {number}: not a run ({error})") from error
            if entry["key"] != run.key:
                raise ValueError(f"{path.name}, line {number}: key and configuration disagree")
            found.setdefault(run.key, Done(run, result))  # the first counts: no second tries
    return found


def append(
    run: Run, result: Mapping[str, Any], about: Mapping[str, Any], folder: Path = RESULTS
) -> None:
    """Write a finished run at the end of its stage's file, whole or not at all."""
    entry = {
        "key": run.key,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "run": asdict(run),
        "rate": run.rate,
        "rank": run.rank,
        "result": dict(result),
        "environment": dict(about),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.stage}.jsonl"
    _drop_cut_line(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")
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
