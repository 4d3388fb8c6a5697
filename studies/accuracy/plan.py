# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

Every tuning run comes before every final one, the tasks with the shortest texts first. The rate of
a cell (task, method, size) is that of the best validation figure on the tuning seed; where that is
the first or the last rate tried, the next one is tried too, up to `protocol.BEYOND` of them on
either side. The final runs of a cell are known once its rate is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from studies.accuracy.protocol import (
    BEYOND,
    FINAL_SEEDS,
    GRIDS,
    TASKS,
    TUNING_SEED,
    Run,
    cells,
)
from studies.accuracy.store import Done


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
    tuning: list[Run] = []
    final: list[tuple[int, Run]] = []
    unknown = 0
    for task in tasks:
        for method, size in cells():
            wanted = [
                run
                for run in _tuning(done, task, method, size, defaults or {})
                if run.key not in done
            ]
            tuning += wanted
            if wanted:
                unknown += len(FINAL_SEEDS)
                continue
            exponent = chosen(done, task, method, size, defaults)
            assert exponent is not None
            for seed in FINAL_SEEDS:
                run = Run("final", task, method, size, exponent, seed, **(defaults or {}))
                if run.key not in done:
                    final.append((seed, run))
    return Plan(tuning, [run for _, run in sorted(final, key=lambda pair: pair[0])], unknown)


def chosen(
    done: Mapping[str, Done],
    task: str,
    method: str,
    size: str | None,
    defaults: Mapping[str, int] | None = None,
) -> int | None:
    """The exponent of a cell's rate: best on validation, the lower one of equals.

    None while a tuning run of the cell is missing.
    """
    runs = _tuning(done, task, method, size, defaults or {})
    if any(run.key not in done for run in runs):
        return None
    return _best(done, runs)


def _tuning(
    done: Mapping[str, Done],
    task: str,
    method: str,
    size: str | None,
    defaults: Mapping[str, int],
) -> list[Run]:
    """The tuning runs of a cell: its grid and, once that is made, what lies beyond a best edge."""
    low, high = min(GRIDS[method]), max(GRIDS[method])
    first, last = low, high
    while True:
        runs = [
            Run("tuning", task, method, size, exponent, TUNING_SEED, **defaults)
            for exponent in range(first, last + 1)
        ]
        if any(run.key not in done for run in runs):
            return runs
        best = _best(done, runs)
        if best == first and first > low - BEYOND:
            first -= 1
        elif best == last and last < high + BEYOND:
            last += 1
        else:
            return runs


def _best(done: Mapping[str, Done], runs: Iterable[Run]) -> int:
    best = max(runs, key=lambda run: (done[run.key].result["validation"], -run.rate_exponent))
    return best.rate_exponent
