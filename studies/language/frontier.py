# SPDX-License-Identifier: Apache-2.0
"""What is forgotten at equal gain: methods compared where their loss on the target is the same.

A lower rate forgets less, so that a method that gains less seems to keep more. The level of a
target is the validation loss that the method that comes least far ends at: all reach it. Between
the two neighbouring rates around the level the loss on the source is interpolated. Where even the
lowest rate tried comes below the level, still lower ones are tried: the ``frontier`` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from studies.language.cells import chosen, loss_of, tuning_runs
from studies.language.protocol import BELOW, METHODS, TUNING_SEED, Run
from studies.language.store import Done


def level(done: Mapping[str, Done], target: str) -> float | None:
    """The loss that every method reaches; None while a tuning run of the target is missing."""
    best = []
    for method in METHODS:
        exponent = chosen(done, target, method)
        if exponent is None:
            return None
        best.append(loss_of(done[Run("tuning", target, method, exponent, TUNING_SEED).key]))
    return max(best)


def frontier_runs(done: Mapping[str, Done], target: str) -> list[Run]:
    """The runs at lower rates that are called for, made or not, for every method of a target."""
    goal = level(done, target)
    wanted: list[Run] = []
    for method in METHODS if goal is not None else ():
        assert goal is not None
        run = tuning_runs(done, target, method)[0]
        for step in range(1, BELOW + 1):
            if run.key not in done or loss_of(done[run.key]) >= goal:
                break
            lowest = tuning_runs(done, target, method)[0].rate_exponent
            run = Run("frontier", target, method, lowest - step, TUNING_SEED)
            wanted.append(run)
    return wanted


def source_at(done: Mapping[str, Done], target: str, method: str) -> float | None:
    """The validation loss on the source where that on the target is the level.

    None while runs are missing, and where no two neighbouring rates lie around the level.
    """
    goal = level(done, target)
    if goal is None:
        return None
    best = chosen(done, target, method)
    assert best is not None
    runs = {run.rate_exponent: run for run in tuning_runs(done, target, method)}
    runs |= {run.rate_exponent: run for run in frontier_runs(done, target) if run.method == method}
    made = [done[runs[e].key] for e in sorted(runs) if e <= best and runs[e].key in done]
    for lower, higher in pairwise(made):
        before, after = loss_of(lower), loss_of(higher)
        if before >= goal >= after and before > after:
            share = (before - goal) / (before - after)
            ends = loss_of(lower, "source_validation"), loss_of(higher, "source_validation")
            return ends[0] + share * (ends[1] - ends[0])
    return None
