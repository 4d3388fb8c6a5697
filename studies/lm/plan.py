# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

First the look; then size by size the other tuning runs, and the final ones seed by seed. The rate
of a method and size is that of the lowest mean validation loss over the tuning targets on the
tuning seed. Who enters a size's finals is known when all its rates are; they, and the methods of
`AT_EVERY_SIZE`, are tuned at the next size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from studies.lm.protocol import (
    AT_EVERY_SIZE,
    BEYOND,
    BY_SOURCE,
    BY_TARGET,
    FINAL_SEEDS,
    GAIN,
    GRIDS,
    LOOK,
    LOOK_ORDER,
    LOW_RANK,
    METHODS,
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

Point = tuple[float, float]
"""The losses of a run on target and source; infinity where they were not finite."""


@dataclass(frozen=True)
class Plan:
    """Runs that could be made now, by stage and in order, and how many are not known yet."""

    look: list[Run]
    tuning: list[Run]
    final: list[Run]
    runs: list[Run]
    unknown_finals: int

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
    wanted, unknown = list(looked), 0
    finals = len(TARGETS) * len(FINAL_SEEDS)
    for size in SIZES:
        entered = methods_at(done, arm, size)
        if entered is None:
            unknown += (BY_TARGET + BY_SOURCE) * len(TUNING_TARGETS) * len(GRIDS["random"])
        for method, of_size in cells(size):
            if method in (entered or AT_EVERY_SIZE):
                for exponent in tuned(done, arm, method, of_size)[0]:
                    wanted += tuning_runs(arm, method, of_size, exponent)
        chosen = finalists(done, arm, size)
        if chosen is None:
            unknown += (len(LOW_RANK) + BY_TARGET + BY_SOURCE) * finals
        else:
            wanted += final_runs(done, arm, size, chosen)
    runs = list({run.key: run for run in wanted if run.key not in done}.values())
    first = {run.key for run in looked}
    return Plan(
        [run for run in runs if run.key in first],
        [run for run in runs if run.stage == "tuning"],
        [run for run in runs if run.stage == "final"],
        runs,
        unknown,
    )


def methods_at(done: Done, arm: Arm, size: str) -> list[str] | None:
    """The methods that are tuned at a size; None while it is not known."""
    first = next(iter(SIZES))
    if size == first:
        return [*METHODS]
    chosen = finalists(done, arm, first)
    return None if chosen is None else [*dict.fromkeys((*AT_EVERY_SIZE, *chosen))]


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


def final_runs(done: Done, arm: Arm, size: str, methods: Iterable[str]) -> list[Run]:
    """The final runs of a size's tuned methods, made or not, in order."""
    rates = {method: tuned(done, arm, method, size)[1] for method in methods}
    return [
        arm.run("final", target, method, size, exponent, seed)
        for seed in FINAL_SEEDS
        for target in TARGETS
        for method, exponent in rates.items()
        if exponent is not None
    ]


def finalists(done: Done, arm: Arm, size: str) -> list[str] | None:
    """The low-rank methods, and the best of ours; None while a rate of the size is not known."""
    entered = methods_at(done, arm, size)
    if entered is None:
        return None
    compared = [method for method in (*LOW_RANK, *SPARSE) if method in entered]
    losses = {method: tuned_loss(done, arm, method, size) for method in compared}
    known = [(loss, method) for method, loss in losses.items() if loss is not None]
    if len(known) < len(losses):
        return None
    ranked = sorted(known, key=lambda each: each[0])  # of equals the first
    ours = [method for _, method in ranked if method in SPARSE]

    reference = best_low_rank(done, arm, size)

    def source(method: str) -> float:
        found = [
            at_equal_gain(done, arm, method, size, target, reference) for target in TUNING_TARGETS
        ]
        return mean(math.inf if value is None else value for value in found)

    return [*LOW_RANK, *ours[:BY_TARGET], *sorted(ours[BY_TARGET:], key=source)[:BY_SOURCE]]


def tuned_loss(done: Done, arm: Arm, method: str, size: str) -> float | None:
    """The mean validation loss over the tuning targets at the best rate; None while not known."""
    exponent = tuned(done, arm, method, size)[1]
    if exponent is None:
        return None
    return mean(point(done, run)[0] for run in tuning_runs(arm, method, size, exponent))


def best_low_rank(done: Done, arm: Arm, size: str) -> str | None:
    """The low-rank method of lowest mean validation loss on the targets; None while not known."""
    losses = {method: tuned_loss(done, arm, method, size) for method in LOW_RANK}
    known = [(loss, method) for method, loss in losses.items() if loss is not None]
    return min(known, key=lambda each: each[0])[1] if len(known) == len(LOW_RANK) else None


def at_equal_gain(
    done: Done, arm: Arm, method: str, size: str, target: str, reference: str | None = None
) -> float | None:
    """What a method has added to the source's loss at equal gain, on the tuning seed.

    `reference` is the low-rank method whose gain counts, the best one if none is named. None while
    runs are missing, and where no two neighbouring rates lie around that gain.
    """
    reference = reference or best_low_rank(done, arm, size)
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


def added_at(done: Done, reference: Run, curve: Mapping[float, Point]) -> float | None:
    """What a curve adds to the source where it has `GAIN` of the reference's gain.

    Over rates or strengths: interpolated between the two neighbours around it, the lowest such;
    None without them.
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
