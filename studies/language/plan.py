# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

A cell is a target and a method. Its rate is that of the lowest validation loss on the target, on
the tuning seed; where that is the first or last rate tried, the next one is tried too, up to
`protocol.BEYOND` of them on either side. The final runs of a cell are known once its rate is.
Every tuning run comes before every final one, and the final ones go seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from studies.language.protocol import BEYOND, FINAL_SEEDS, GRIDS, METHODS, TARGETS, TUNING_SEED, Run
from studies.language.store import Done


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


def plan(done: Mapping[str, Done], targets: Iterable[str] = TARGETS) -> Plan:
    """The missing runs of `targets`."""
    tuning: list[Run] = []
    final: list[Run] = []
    unknown = 0
    for target in targets:
        for method in METHODS:
            wanted = [run for run in tuning_runs(done, target, method) if run.key not in done]
            tuning += wanted
            runs = final_runs(done, target, method)
            final += [run for run in runs or () if run.key not in done]
            unknown += len(FINAL_SEEDS) if runs is None else 0
    return Plan(tuning, sorted(final, key=lambda run: run.seed), unknown)


def chosen(done: Mapping[str, Done], target: str, method: str) -> int | None:
    """The exponent of a cell's rate: lowest validation loss, the lower rate of equals.

    None while a tuning run of the cell is missing.
    """
    runs = tuning_runs(done, target, method)
    return None if any(run.key not in done for run in runs) else _best(done, runs)


def final_runs(done: Mapping[str, Done], target: str, method: str) -> list[Run] | None:
    """The final runs of a cell, made or not; None while its rate is not known."""
    exponent = chosen(done, target, method)
    if exponent is None:
        return None
    return [Run("final", target, method, exponent, seed) for seed in FINAL_SEEDS]


def tuning_runs(done: Mapping[str, Done], target: str, method: str) -> list[Run]:
    """The tuning runs of a cell: its grid and, once that is made, what lies beyond a best edge."""
    low, high = min(GRIDS[method]), max(GRIDS[method])
    first, last = low, high
    while True:
        runs = [Run("tuning", target, method, e, TUNING_SEED) for e in range(first, last + 1)]
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
    def loss(run: Run) -> float:
        value = done[run.key].result["target_validation"]
        return math.inf if value is None else value

    return min(runs, key=lambda run: (loss(run), run.rate_exponent)).rate_exponent
