# SPDX-License-Identifier: Apache-2.0
"""The committed runs as Markdown tables: a figure stands there only where all its runs exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean

from studies.accuracy.tables import spread
from studies.fusion.protocol import FAMILIES, LOW_RANK, SEEDS, SPARSE, TASKS
from studies.fusion.runs import Done
from studies.page import NOT_YET, markdown

Figures = Mapping[str, float]


def overlaps(done: Mapping[str, Done]) -> str:
    """How the adapters of each family overlap, the mean of the seeds, beside what a sum keeps."""
    names = ["shared", "cosine", "sign_conflicts", "awor"]

    def cells(runs: list[Done]) -> list[str]:
        given = [[run.result["overlap"].get(name) for run in runs] for name in names]
        figures = [NOT_YET if None in values else f"{mean(values):.3f}" for values in given]
        return [*figures, *(lost(runs, way) for way in ("sum", "mean"))]

    columns = ["adapters", "positions shared", "cosine", "sign conflicts", "AWOR"]
    return _families(done, [*columns, "lost by the sum", "lost by the mean"], cells)


def alone(done: Mapping[str, Done]) -> str:
    """Each task with its own adapter, with none, and with another task's: the mean of the tasks."""

    def cells(runs: list[Done]) -> list[str]:
        by_task = [spread([run.result["alone"][task] for run in runs]) for task in TASKS]
        means = [
            spread([mean(run.result[what].values()) for run in runs])
            for what in ("alone", "others", "without")
        ]
        return [*by_task, *means]

    own = [f"{task}, its own adapter" for task in TASKS]
    columns = ["adapters", *own, "mean", "mean, another's", "mean, none"]
    return _families(done, columns, cells)


def kept(done: Mapping[str, Done]) -> str:
    """The mean accuracy of the three tasks with one fused adapter, by family and way."""
    ways = list(dict.fromkeys([*SPARSE, *LOW_RANK]))
    return markdown(["fused by", *FAMILIES], [[way, *_by_family(done, _kept, way)] for way in ways])


def losses(done: Mapping[str, Done]) -> str:
    """What fusing lost: the same figure minus that of each task's own adapter, in points."""
    ways = list(dict.fromkeys([*SPARSE, *LOW_RANK]))
    return markdown(["fused by", *FAMILIES], [[way, *_by_family(done, lost, way)] for way in ways])


def of_family(done: Mapping[str, Done], family: str) -> list[Done] | None:
    """The runs of a family by seed; None while one is missing."""
    runs = sorted((d for d in done.values() if d.run.family == family), key=lambda d: d.run.seed)
    return runs if [entry.run.seed for entry in runs] == list(SEEDS) else None


def lost(runs: list[Done], way: str) -> str:
    """Mean over the tasks of fused minus alone, and its spread over the seeds."""
    return spread(
        [mean(run.result["fused"][way][t] - run.result["alone"][t] for t in TASKS) for run in runs]
    )


def _families(
    done: Mapping[str, Done], columns: list[str], cells: Callable[[list[Done]], list[str]]
) -> str:
    """A table of one line a family, without figures where a run is missing."""
    rows = []
    for family in FAMILIES:
        runs = of_family(done, family)
        rows.append([family, *([NOT_YET] * (len(columns) - 1) if runs is None else cells(runs))])
    return markdown(columns, rows)


def _kept(runs: list[Done], way: str) -> str:
    return spread([mean(run.result["fused"][way].values()) for run in runs])


def _by_family(
    done: Mapping[str, Done], cell: Callable[[list[Done], str], str], way: str
) -> list[str]:
    cells = []
    for family in FAMILIES:
        runs = of_family(done, family)
        there = runs is not None and way in runs[0].run.ways
        cells.append(cell(runs, way) if runs is not None and there else NOT_YET)
    return cells
