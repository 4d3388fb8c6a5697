# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

First the look, then the other tuning runs, then the final ones: at the chosen rates seed by seed,
then at lower ones. The rate of a method and size is that of the lowest mean validation loss over
the tuning targets on the tuning seed. Who enters the finals is known when all rates are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from studies.lm.protocol import (
    BEYOND,
    BY_SOURCE,
    BY_TARGET,
    FINAL_SEEDS,
    GRIDS,
    LOOK,
    LOOK_ORDER,
    LOW_RANK,
    LOWER,
    SIZES,
    SPARSE,
    TARGETS,
    TUNING_SEED,
    TUNING_TARGETS,
    Arm,
    Run,
    cells,
)
from studies.lm.runs import Done
from studies.tuning import explore

GAIN = 0.9
"""Equal gain: so much of what the best low-rank method of a size gains on the target."""

Point = tuple[float, float]
"""The losses of a run on target and source; infinity where they were not finite."""


@dataclass(frozen=True)
class Plan:
    """Runs that could be made now, and how many of the finals are not known yet."""

    look: list[Run]
    tuning: list[Run]
    final: list[Run]
    unknown_finals: int

    @property
    def runs(self) -> list[Run]:
        """The runs that could be made now, in order."""
        return self.look + self.tuning + self.final

    @property
    def missing(self) -> int:
        """How many runs are missing in all, at least."""
        return len(self.runs) + self.unknown_finals


def plan(done: Done, arm: Arm) -> Plan:
    """What is missing of an arm."""
    methods, target, size = LOOK
    looked = [
        arm.run("tuning", target, method, size, GRIDS[method][place], TUNING_SEED)
        for place in LOOK_ORDER
        for method in methods
    ]
    tuning = [
        arm.run("tuning", target, method, size, exponent, TUNING_SEED)
        for method, size in cells()
        for exponent in tuned(done, arm, method, size)[0]
        for target in TUNING_TARGETS
    ]
    chosen = finalists(done, arm)
    final = [] if chosen is None else final_runs(done, arm, chosen)
    unknown = 0
    if chosen is None:
        count = len(LOW_RANK) + BY_TARGET + BY_SOURCE
        unknown = count * len(SIZES) * len(TARGETS) * len(FINAL_SEEDS) * (1 + LOWER)
    first = {run.key for run in looked}
    return Plan(
        _missing(done, looked),
        [run for run in _missing(done, tuning) if run.key not in first],
        _missing(done, final),
        unknown,
    )


def tuned(done: Done, arm: Arm, method: str, size: str | None) -> tuple[list[int], int | None]:
    """The exponents to try for a method and size, and the best; None while a run is missing."""

    def loss(exponent: int) -> float | None:
        runs = tuning_runs(arm, method, size, exponent)
        if any(run.key not in done for run in runs):
            return None
        return mean(point(done, run)[0] for run in runs)

    return explore(GRIDS[method], BEYOND, loss)


def tuning_runs(arm: Arm, method: str, size: str | None, exponent: int) -> list[Run]:
    """The tuning runs of a method, size and rate, one for each tuning target."""
    return [
        arm.run("tuning", target, method, size, exponent, TUNING_SEED) for target in TUNING_TARGETS
    ]


def final_runs(done: Done, arm: Arm, methods: Iterable[str]) -> list[Run]:
    """The final runs of tuned methods, made or not, in order."""
    methods = list(methods)
    rates = {(m, size): tuned(done, arm, m, size)[1] for m in methods for size in SIZES}
    return [
        arm.run("final", target, method, size, exponent - lower, seed)
        for lower in range(LOWER + 1)
        for seed in FINAL_SEEDS
        for target in TARGETS
        for (method, size), exponent in rates.items()
        if exponent is not None
    ]


def finalists(done: Done, arm: Arm) -> list[str] | None:
    """The low-rank methods, and the best of ours; None while a rate is not known."""
    best = {(m, size): tuned(done, arm, m, size)[1] for m, size in cells()}
    if None in best.values():
        return None

    def target_loss(method: str) -> float:
        runs = [r for s in SIZES for r in tuning_runs(arm, method, s, best[method, s] or 0)]
        return mean(point(done, run)[0] for run in runs)

    def source_loss(method: str) -> float:
        found = [at_equal_gain(done, arm, method, s, t) for s in SIZES for t in TUNING_TARGETS]
        return mean(math.inf if value is None else value for value in found)

    ours = sorted(SPARSE, key=target_loss)[:BY_TARGET]
    others = [method for method in sorted(SPARSE, key=target_loss) if method not in ours]
    return [*LOW_RANK, *ours, *sorted(others, key=source_loss)[:BY_SOURCE]]


def best_low_rank(done: Done, arm: Arm, size: str) -> str | None:
    """The low-rank method of lowest mean validation loss on the targets; None while not known."""
    losses = {}
    for method in LOW_RANK:
        exponent = tuned(done, arm, method, size)[1]
        if exponent is None:
            return None
        runs = tuning_runs(arm, method, size, exponent)
        losses[method] = mean(point(done, run)[0] for run in runs)
    return min(losses, key=lambda method: losses[method])


def at_equal_gain(done: Done, arm: Arm, method: str, size: str, target: str) -> float | None:
    """What a method has added to the source's loss at equal gain, on the tuning seed.

    None while runs are missing, and where no two neighbouring rates lie around that gain.
    """
    reference = best_low_rank(done, arm, size)
    if reference is None:
        return None

    def run(method: str, exponent: int) -> Run:
        return arm.run("tuning", target, method, size, exponent, TUNING_SEED)

    curve = {
        e: point(done, run(method, e))
        for e in tuned(done, arm, method, size)[0]
        if run(method, e).key in done
    }
    exponent = tuned(done, arm, reference, size)[1]
    assert exponent is not None
    return added_at(done, run(reference, exponent), curve)


def added_at(done: Done, reference: Run, curve: Mapping[int, Point]) -> float | None:
    """What a curve over rates adds to the source where it has `GAIN` of the reference's gain.

    Interpolated between the two neighbouring rates around it, the lowest such; None without them.
    """
    base = done[reference.key].result
    level = base["target_before"] - GAIN * (base["target_before"] - point(done, reference)[0])
    for lower, higher in pairwise(sorted(curve)):
        (before, one), (after, two) = curve[lower], curve[higher]
        if before >= level >= after and math.isfinite(before) and before > after:
            added = one + (before - level) / (before - after) * (two - one)
            return added - float(base["source_before"])
    return None


def point(done: Done, run: Run) -> Point:
    """The losses of a run that was made."""
    result = done[run.key].result
    target, source = (
        math.inf if result[part] is None else float(result[part]) for part in ("target", "source")
    )
    return target, source


def _missing(done: Done, runs: Iterable[Run]) -> list[Run]:
    return list({run.key: run for run in runs if run.key not in done}.values())
