# SPDX-License-Identifier: Apache-2.0
"""Everything that the page shows of some adapters, read and measured, as plain values."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira.checkpoints import Checkpoint
from shira.cli.pictures import heat_map
from shira.cli.progress import track
from shira.cli.several import all_pairs, ranks, short_names
from shira.cli.summary import Summary, summarize
from shira.errors import FileFormatError
from shira.measure import Overlap, Rank
from shira.store.json_text import read_object
from shira.support import Support, matrix_shape

_BYTES = 2**21  # of all maps of a page together, before they become text
_LEAST, _MOST = 24, 384  # rows and columns of parts of a map
LOGS = {"metrics.json": "history", "trainer_state.json": "log_history"}
"""Files that may hold a training log, and its key in them: of `shira train`, of Trainer."""

LOSSES = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
_LARGEST = 2**26  # bytes of a log
_POINTS = 1000  # of a curve

Points = list[tuple[float, float]]


def side(maps: int) -> int:
    """Return the rows and columns of parts of each of so many maps, to keep the page small."""
    return min(max(math.isqrt(_BYTES // max(maps, 1)), _LEAST), _MOST)


def mask_map(name: str, support: Support, most: int) -> dict[str, Any]:
    """Return the heat map of one weight, in O(k), as the script of the page draws it.

    It has at most ``most`` rows (``down``) and columns (``across``) of parts of like size. ``top``
    is the largest share of trained entries in a part. ``cells``, ``down * across`` bytes in base64,
    are the shares in 255ths of that; 0 only where there is no entry.
    """
    rows, cols = matrix_shape(support.shape)
    made = heat_map(support, (_parts(rows, most), _parts(cols, most)))
    top = float(made.max(initial=0.0))
    cells = np.ceil(made * (255 / (top or 1.0))).clip(0, 255).astype(np.uint8)
    return {
        "name": name,
        "rows": rows,
        "cols": cols,
        "down": made.shape[0],
        "across": made.shape[1],
        "top": top,
        "cells": base64.b64encode(cells.tobytes()).decode("ascii"),
    }


def _parts(size: int, most: int) -> int:
    """Return a number of parts that hold equally many rows, but perhaps for one row less."""
    return -(-size // -(-size // most)) if size else 0


@dataclass(frozen=True)
class Curve:
    """Losses over optimizer steps, by their names; from a log, or why it could not be read."""

    file: str
    series: Mapping[str, Points] = field(default_factory=dict)
    problem: str | None = None
    every: int = 1  # one point of so many is kept


def training_curve(path: Path) -> Curve | None:
    """Return the curve of the adapter at ``path``, or why it cannot be read; None without one."""
    problem = None
    for name, key in LOGS.items():
        file = log_folder(path) / name
        if not file.is_file():
            continue
        try:
            log = read_object(file, "training log", _LARGEST).get(key)
        except (FileFormatError, OSError) as error:
            problem = problem or Curve(name, problem=str(error))
            continue
        series = {label: points for loss, label in LOSSES if (points := _points(log, loss))}
        if series:
            every = -(-max(map(len, series.values())) // _POINTS)
            kept = {label: points[::every] for label, points in series.items()}
            return Curve(name, kept, every=every)
    return problem


def log_folder(path: Path) -> Path:
    """Return the folder that would hold the log of an adapter: its own, or that of its file."""
    return path if path.is_dir() else path.parent


def _points(log: object, name: str) -> Points:
    rows = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
    rows = [row for row in rows if _is_number(row.get("step")) and _is_number(row.get(name))]
    return sorted((float(row["step"]), float(row[name])) for row in rows)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Described:
    """One adapter."""

    name: str  # short, told apart from the others
    summary: Summary
    maps: list[dict[str, Any]]  # of each weight
    ranks: dict[str, Rank]  # by weight; empty if they were left out
    curve: Curve | None  # of its training, if there is a log that is of no other adapter


def gather(
    paths: Sequence[Path], base: Checkpoint | None, *, fast: bool, seed: int, check_base: bool
) -> tuple[list[Described], list[Overlap]]:
    """Read adapters; return each, and all pairs; arguments and errors are `write_report`'s."""
    names = short_names(paths)
    summaries = [summarize(path, base) for path in track(paths, "reading")]
    adapters = [summary.required_adapter("a report") for summary in summaries]
    pairs = all_pairs(adapters, names, interference=not fast, seed=seed, check_base=check_base)
    measured = {} if fast else ranks(adapters, names, seed=seed)
    real = [path.resolve() for path in paths]
    folders = Counter(map(log_folder, set(real)))  # whose log is it, if several share a folder?
    most = side(sum(map(len, adapters)))
    described = [
        Described(
            name=name,
            summary=summary,
            maps=[mask_map(key, delta.support, most) for key, delta in adapter.items()],
            ranks=measured.get(name, {}),
            curve=training_curve(summary.path) if folders[log_folder(path)] == 1 else None,
        )
        for name, path, summary, adapter in zip(names, real, summaries, adapters, strict=True)
    ]
    return described, pairs
