# SPDX-License-Identifier: Apache-2.0
"""The training curve of an adapter, from the log that its training left beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shira.errors import FileFormatError
from shira.store.json_text import parse_object

LOGS = (("metrics.json", "history"), ("trainer_state.json", "log_history"))
"""Files that are looked for, and what in them is the log: of `shira train`, of Trainer."""

LOSSES = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
_LARGEST = 2**26  # bytes of a log
_POINTS = 1000  # of a curve

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Losses over optimizer steps.

    Attributes:
        file: Name of the log.
        series: Points of each loss that was logged, by its name.
        problem: Why it could not be read.
        every: One point of so many is kept.
    """

    file: str
    series: Mapping[str, Points] = field(default_factory=dict)
    problem: str | None = None
    every: int = 1


def training_curve(path: Path) -> Curve | None:
    """The curve of the adapter at ``path``; None if there is no log with losses beside it.

    A log that cannot be read is no error: it is not what was asked for. The curve says so.
    """
    folder = log_folder(path)
    problem = None
    for name, key in LOGS:
        if not (folder / name).is_file():
            continue
        try:
            curve = _read(folder / name, key)
        except (FileFormatError, OSError) as error:
            problem = problem or Curve(name, problem=str(error))
            continue
        if curve.series:
            return curve
    return problem


def log_folder(path: Path) -> Path:
    """Where the log of the adapter at ``path`` would be: in its folder, or beside its file."""
    return path if path.is_dir() else path.parent


def _read(file: Path, key: str) -> Curve:
    size = file.stat().st_size
    if size > _LARGEST:
        raise FileFormatError(f"{file}: a log of {size} bytes is not read")
    log = parse_object(file.read_bytes(), file, "training log").get(key)
    rows = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
    series = {label: _points(rows, name) for name, label in LOSSES}
    every = max(1, -(-max(map(len, series.values())) // _POINTS))
    return Curve(
        file.name,
        {label: points[::every] for label, points in series.items() if points},
        every=every,
    )


def _points(rows: list[dict[str, Any]], name: str) -> Points:
    found = ((_finite(row.get("step")), _finite(row.get(name))) for row in rows)
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
