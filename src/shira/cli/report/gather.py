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

from shira.adapter import Adapter
from shira.checkpoints import Checkpoint
from shira.cli.pictures import heat_map
from shira.cli.progress import track
from shira.cli.several import all_pairs, ranks, short_names
from shira.cli.summary import Summary, known_shapes, summarize
from shira.errors import FileFormatError
from shira.measure import Overlap, Rank
from shira.store.json_text import read_object
from shira.support import Support, matrix_shape

_BYTES = 2**21  # of all maps of a page together, before they become text
_LEAST, _MOST = 24, 384  # rows and columns of parts of a map
LOGS = (("metrics.json", "history"), ("trainer_state.json", "log_history"))
"""Files that may hold a training log, and its key in them: of `shira train`, of Trainer."""

LOSSES = (("loss", "training loss"), ("eval_loss", "evaluation loss"))
_LARGEST = 2**26  # bytes of a log
_POINTS = 1000  # of a curve

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Map:
    """A heat map: where the entries of one weight are.

    Attributes:
        name: Of the weight.
        shape: Of the weight seen as a matrix.
        down: Rows of parts; ``across`` columns of parts.
        top: The largest share of trained entries in a part.
        cells: ``down * across`` bytes: shares in 255ths of ``top``; 0 only where there is no entry.
    """

    name: str
    shape: tuple[int, int]
    down: int
    across: int
    top: float
    cells: bytes

    def as_json(self) -> dict[str, Any]:
        """Return what the script of the page draws it from."""
        return {
            "name": self.name,
            "rows": self.shape[0],
            "cols": self.shape[1],
            "down": self.down,
            "across": self.across,
            "top": self.top,
            "cells": base64.b64encode(self.cells).decode("ascii"),
        }


def side(maps: int) -> int:
    """Return the rows and columns of parts of each of so many maps, to keep the page small."""
    return min(max(math.isqrt(_BYTES // max(maps, 1)), _LEAST), _MOST)


def mask_map(name: str, support: Support, most: int) -> Map:
    """Return the map of one weight: at most ``most`` x ``most`` parts of like size, in O(k)."""
    shape = matrix_shape(support.shape)
    made = heat_map(support, (_parts(shape[0], most), _parts(shape[1], most)))
    top = float(made.max()) if made.size else 0.0
    cells = np.ceil(made * (255 / top)) if top else made
    down, across = made.shape
    return Map(name, shape, down, across, top, cells.clip(0, 255).astype(np.uint8).tobytes())


def _parts(size: int, most: int) -> int:
    """Return a number of parts that hold equally many rows, but perhaps for one row less."""
    return -(-size // -(-size // most)) if size else 0


@dataclass(frozen=True)
class Curve:
    """Losses over optimizer steps.

    Attributes:
        file: Name of the log.
        series: Points of each loss that was logged, by its name.
        problem: Reason why it could not be read.
        every: One point of so many is kept.
    """

    file: str
    series: Mapping[str, Points] = field(default_factory=dict)
    problem: str | None = None
    every: int = 1


def training_curve(path: Path) -> Curve | None:
    """Return the curve of the adapter at ``path``; None if there is no log with losses beside it.

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
    """Return the folder that would hold the log of an adapter: its own, or that of its file."""
    return path if path.is_dir() else path.parent


def _read(file: Path, key: str) -> Curve:
    log = read_object(file, "training log", _LARGEST).get(key)
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


@dataclass(frozen=True)
class Described:
    """One adapter.

    Attributes:
        name: Short, told apart from the others.
        summary: As `shira inspect` has it.
        adapter: Its entries.
        maps: Of each weight.
        ranks: By weight; empty if they were left out.
        curve: Of its training; None without a log, or where several adapters share its folder.
    """

    name: str
    summary: Summary
    adapter: Adapter
    maps: tuple[Map, ...]
    ranks: dict[str, Rank]
    curve: Curve | None


@dataclass(frozen=True)
class Report:
    """Some adapters and all pairs of them."""

    adapters: tuple[Described, ...]
    pairs: tuple[Overlap, ...]


def gather(
    paths: Sequence[Path],
    base: Checkpoint | None = None,
    *,
    fast: bool = False,
    seed: int = 0,
    check_base: bool = True,
) -> Report:
    """Read and measure adapters; arguments and errors are those of `write_report`."""
    names = short_names(paths)
    summaries = [summarize(path, base) for path in track(paths, "reading")]
    adapters = [
        Adapter.load(summary.path, base=known_shapes(summary, "a report")) for summary in summaries
    ]
    pairs = all_pairs(adapters, names, interference=not fast, seed=seed, check_base=check_base)
    measured: dict[str, dict[str, Rank]] = {name: {} for name in names}
    for name, parameter, rank in [] if fast else ranks(adapters, names, seed=seed):
        measured[name][parameter] = rank
    real = [path.resolve() for path in paths]
    folders = Counter(map(log_folder, set(real)))  # whose log is it, if several share a folder?
    most = side(sum(map(len, adapters)))
    return Report(
        tuple(
            Described(
                name=name,
                summary=summary,
                adapter=adapter,
                maps=tuple(mask_map(key, delta.support, most) for key, delta in adapter.items()),
                ranks=measured[name],
                curve=training_curve(summary.path) if folders[log_folder(path)] == 1 else None,
            )
            for name, path, summary, adapter in zip(names, real, summaries, adapters, strict=True)
        ),
        tuple(pairs),
    )
