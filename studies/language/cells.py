# SPDX-License-Identifier: Apache-2.0
"""A cell is a target and a method: its tuning runs, the rate they choose, and its final runs.

The rate is that of the lowest validation loss on the target, on the tuning seed; where that is the
first or last rate tried, the next one is tried too, up to `protocol.BEYOND` of them on either side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from studies.language.protocol import BEYOND, FINAL_SEEDS, GRIDS, TUNING_SEED, Run
from studies.language.store import Done


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


def loss_of(entry: Done, what: str = "target_validation") -> float:
    """A loss of a run; infinity where it was not finite."""
    value: float | None = entry.result[what]
    return math.inf if value is None else value


def _best(done: Mapping[str, Done], runs: Iterable[Run]) -> int:
    best = min(runs, key=lambda run: (loss_of(done[run.key]), run.rate_exponent))
    return best.rate_exponent
