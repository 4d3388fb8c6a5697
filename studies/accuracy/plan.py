# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

Every tuning run comes before every final one, and the final ones seed by seed. The rate of a cell
(method, size) is that of the best mean validation figure over the tuning tasks on the tuning seed;
where that is the first or the last rate tried, the next one is tried too, up to `protocol.BEYOND`
of them on either side. The final runs of a cell are known once its rate is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean

from studies.accuracy.protocol import (
    BEYOND,
    FINAL_SEEDS,
    GRIDS,
    TASKS,
    TUNING_SEED,
    TUNING_TASKS,
    Run,
    cells,
)
from studies.accuracy.runs import Done
from studies.tuning import explore


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    `tuning` and `final` are runs that could be made now; `unknown_finals` counts those whose rate
    is not known yet. Tuning runs beyond the grid are counted as soon as they are called for.
    """

    tuning: list[Run]
    final: list[Run]
    unknown_finals: int

    @property
    def runs(self) -> list[Run]:
        """The runs that could be made now, in order."""
        return self.tuning + self.final

    @property
    def missing(self) -> int:
        """How many runs are missing in all, at least."""
        return len(self.runs) + self.unknown_finals


def plan(
    done: Mapping[str, Done],
    tasks: Iterable[str] = TASKS,
    defaults: Mapping[str, int] | None = None,
) -> Plan:
    """The missing runs of `tasks`; `defaults` overrides fields of `Run`, for tests."""
    tasks = tuple(tasks)
    tuning: list[Run] = []
    final: list[Run] = []
    unknown = 0
    for method, size in cells():
        exponent = chosen(done, method, size, defaults)
        if exponent is None:
            rows = tuning_runs(done, method, size, defaults).values()
            tuning += [r for runs in rows for r in runs if r.key not in done and r.task in tasks]
            unknown += len(FINAL_SEEDS) * len(tasks)
            continue
        for task in tasks:
            runs = final_runs(task, method, size, exponent, defaults)
            final += [run for run in runs if run.key not in done]
    return Plan(tuning, sorted(final, key=lambda run: run.seed), unknown)


def chosen(
    done: Mapping[str, Done],
    method: str,
    size: str | None,
    defaults: Mapping[str, int] | None = None,
) -> int | None:
    """The exponent of a cell's rate: best mean validation figure, the lower one of equals.

    None while a tuning run of the cell is missing.
    """
    return _explored(done, method, size, defaults)[1]


def tuning_runs(
    done: Mapping[str, Done],
    method: str,
    size: str | None,
    defaults: Mapping[str, int] | None = None,
) -> dict[int, list[Run]]:
    """A cell's tuning runs by exponent: its grid and, once that is made, what lies beyond an edge.

    In each list one run for every tuning task.
    """
    return _explored(done, method, size, defaults)[0]


def _explored(
    done: Mapping[str, Done], method: str, size: str | None, defaults: Mapping[str, int] | None
) -> tuple[dict[int, list[Run]], int | None]:
    """A cell's tuning runs by exponent, and the best exponent; None while a run is missing."""

    def runs(exponent: int) -> list[Run]:
        return [
            Run("tuning", task, method, size, exponent, TUNING_SEED, **(defaults or {}))
            for task in TUNING_TASKS
        ]

    def loss(exponent: int) -> float | None:
        figure = validation(done, {exponent: runs(exponent)})[exponent]
        return None if figure is None else -round(figure, 6)

    tried, best = explore(GRIDS[method], BEYOND, loss)
    return {exponent: runs(exponent) for exponent in tried}, best


def final_runs(
    task: str,
    method: str,
    size: str | None,
    exponent: int,
    defaults: Mapping[str, int] | None = None,
) -> list[Run]:
    """The final runs of a cell on a task, one for each seed."""
    return [
        Run("final", task, method, size, exponent, seed, **(defaults or {})) for seed in FINAL_SEEDS
    ]


def validation(
    done: Mapping[str, Done], runs: Mapping[int, Iterable[Run]]
) -> dict[int, float | None]:
    """The mean validation figure over the tuning tasks by exponent; None where a run is missing."""
    figures = {}
    for exponent, of_tasks in runs.items():
        made = [done.get(run.key) for run in of_tasks]
        values = [entry.result["validation"] for entry in made if entry is not None]
        figures[exponent] = mean(values) if len(values) == len(made) else None
    return figures
