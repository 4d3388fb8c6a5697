# SPDX-License-Identifier: Apache-2.0
"""Which runs are missing, in which order, given those that were made. A pure function of them.

The look; then the screen: every method on the first tuning target at the first size. Those that
enter are tuned on all tuning targets, the best of them on the first target at the next size; then
come the finals, seed by seed. The rate of a method and size is that of the lowest
validation loss on the tuning seed: the mean over the targets, each as a share of the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from studies.lm.protocol import (
    BEST,
    BEYOND,
    ENTER,
    FINAL_LOW_RANK,
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
    size_of,
)
from studies.lm.runs import Done
from studies.tuning import explore

FIRST, *_ = SIZES
SCREEN = TUNING_TARGETS[:1]

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
    finals: list[Run] = []
    for method in METHODS:
        for exponent in screened(done, arm, method)[0]:
            wanted += tuning_runs(arm, method, FIRST, exponent, SCREEN)
    for size in SIZES:
        for method in entered(done, arm, size) or ():
            for exponent in tuned(done, arm, method, size)[0]:
                wanted += tuning_runs(arm, method, size, exponent)
    for size in SIZES:
        chosen = finalists(done, arm, size)
        if chosen is None:
            unknown += (len(FINAL_LOW_RANK) + sum(BEST)) * len(TARGETS) * len(FINAL_SEEDS)
        else:
            finals += final_runs(done, arm, size, chosen)
    wanted += sorted(finals, key=lambda run: run.seed)
    runs = list({run.key: run for run in wanted if run.key not in done}.values())
    first = {run.key for run in looked}
    return Plan(
        [run for run in runs if run.key in first],
        [run for run in runs if run.stage == "tuning"],
        [run for run in runs if run.stage == "final"],
        runs,
        unknown,
    )


def targets_at(size: str) -> tuple[str, ...]:
    """Where rates of a size are tuned."""
    return TUNING_TARGETS if size == FIRST else SCREEN


def screened(done: Done, arm: Arm, method: str) -> tuple[list[float], float | None]:
    """The exponents to try on the screen, and the best; None while a run is missing."""
    return _explore(done, arm, method, FIRST, GRIDS[method], SCREEN)


def tuned(done: Done, arm: Arm, method: str, size: str) -> tuple[list[float], float | None]:
    """The exponents to try for a method and size, and the best; none while not known.

    To begin with those around the best of the screen, or at a later size of the first size.
    """
    _, start = screened(done, arm, method) if size == FIRST else tuned(done, arm, method, FIRST)
    if start is None:
        return [], None
    return _explore(done, arm, method, size, (start - 1, start, start + 1), targets_at(size))


def _explore(
    done: Done, arm: Arm, method: str, size: str, grid: Iterable[float], targets: Sequence[str]
) -> tuple[list[float], float | None]:
    def loss(exponent: float) -> float | None:
        runs = tuning_runs(arm, method, size, exponent, targets)
        if any(run.key not in done for run in runs):
            return None
        return _mean_loss(done, runs)

    return explore(grid, BEYOND, loss)


def _mean_loss(done: Done, runs: Iterable[Run]) -> float:
    """Each run's loss on its target as a share of the base's, so that they weigh alike."""
    return mean(point(done, run)[0] / done[run.key].result["target_before"] for run in runs)


def tuning_runs(
    arm: Arm, method: str, size: str, exponent: float, targets: Sequence[str] | None = None
) -> list[Run]:
    """The tuning runs of a method, size and rate, one for each of the targets."""
    return [
        arm.run("tuning", target, method, size_of(method, size), exponent, TUNING_SEED)
        for target in targets or targets_at(size)
    ]


def final_runs(
    done: Done, arm: Arm, size: str, methods: Iterable[str], seeds: Sequence[int] = FINAL_SEEDS
) -> list[Run]:
    """The final runs of a size's tuned methods, made or not, in order."""
    rates = {method: tuned(done, arm, method, size)[1] for method in methods}
    return [
        arm.run("final", target, method, size, exponent, seed)
        for seed in seeds
        for target in TARGETS
        for method, exponent in rates.items()
        if exponent is not None
    ]


def entered(done: Done, arm: Arm, size: str) -> list[str] | None:
    """The methods that are tuned at a size; None while it is not known.

    At the first size the low-rank ones and the best of ours on the screen; at the others those of
    the finals of the first, and all low-rank ones.
    """
    if size != FIRST:
        chosen = finalists(done, arm, FIRST)
        return None if chosen is None else [*dict.fromkeys((*LOW_RANK, *chosen))]
    tried = {method: screened(done, arm, method) for method in METHODS}
    best = {method: exponent for method, (_, exponent) in tried.items()}
    # Of those that enter more rates will be tried: they must not change who enters.
    seen = {method: exponents for method, (exponents, _) in tried.items()}
    ours = _best_of_ours(done, arm, size, best, SCREEN, ENTER, seen)
    return None if ours is None else [*LOW_RANK, *ours]


def finalists(done: Done, arm: Arm, size: str) -> list[str] | None:
    """The methods of a size's finals; None while a rate of the size is not known."""
    compared = entered(done, arm, size)
    if compared is None:
        return None
    best = {method: tuned(done, arm, method, size)[1] for method in compared}
    ours = _best_of_ours(done, arm, size, best, targets_at(size), BEST)
    reference = best_low_rank(done, arm, size)
    if ours is None or reference is None:
        return None
    return [*dict.fromkeys((*FINAL_LOW_RANK, reference, *ours))]


def _best_of_ours(
    done: Done,
    arm: Arm,
    size: str,
    best: Mapping[str, float | None],
    targets: Sequence[str],
    counts: tuple[int, int],
    seen: Mapping[str, Sequence[float]] | None = None,
) -> list[str] | None:
    """So many of ours by target loss, and so many more by what they add to the source's.

    `seen` are the exponents of each method that count for the latter; None: all that were tried.
    """
    if None in best.values():
        return None
    rates = {method: exponent for method, exponent in best.items() if exponent is not None}
    losses = {
        method: _mean_loss(done, tuning_runs(arm, method, size, e, targets))
        for method, e in rates.items()
    }
    reference = min((m for m in LOW_RANK if m in losses), key=losses.__getitem__)
    ranked = sorted((m for m in losses if m in SPARSE), key=losses.__getitem__)

    def added(method: str, target: str) -> float:
        goal, exponents = (reference, rates[reference]), None if seen is None else seen[method]
        found = at_equal_gain(done, arm, method, size, target, goal, exponents)
        return math.inf if found is None else found

    by_target, by_source = counts
    others = ranked[by_target:]
    by_target_and_method = [{m: added(m, target) for m in others} for target in targets]
    # a target on which it can be told of nobody says nothing
    told = [each for each in by_target_and_method if any(map(math.isfinite, each.values()))]
    sums = {method: sum(each[method] for each in told) for method in others}
    return [*ranked[:by_target], *sorted(others, key=sums.__getitem__)[:by_source]]


def best_low_rank(done: Done, arm: Arm, size: str) -> str | None:
    """The low-rank method of lowest validation loss on the targets; None while not known."""
    losses = {}
    for method in LOW_RANK:
        exponent = tuned(done, arm, method, size)[1]
        if exponent is None:
            return None
        losses[method] = _mean_loss(done, tuning_runs(arm, method, size, exponent))
    return min(losses, key=losses.__getitem__)


def at_equal_gain(
    done: Done,
    arm: Arm,
    method: str,
    size: str,
    target: str,
    reference: tuple[str, float],
    exponents: Sequence[float] | None = None,
) -> float | None:
    """What a method has added to the source's loss at equal gain, on the tuning seed.

    `reference` is the method and exponent whose gain counts. Of the method the rates of
    `exponents` count, or all that were tried; None where no two neighbours of them lie around
    that gain.
    """
    goal = arm.run("tuning", target, reference[0], size, reference[1], TUNING_SEED)
    points = curve(done, arm, method, size, target)
    if exponents is not None:
        points = {exponent: points[exponent] for exponent in exponents if exponent in points}
    return added_at(level_of(done, goal), points, done[goal.key].result["source_before"])


def curve(done: Done, arm: Arm, method: str, size: str, target: str) -> dict[float, Point]:
    """The losses on target and source by exponent, of every tuning run that was made."""
    wanted = ("tuning", target, method, size_of(method, size), arm)
    return {
        run.rate_exponent: point(done, run)
        for run in sorted((e.run for e in done.values()), key=lambda run: run.rate_exponent)
        if (run.stage, run.target, run.method, run.size, Arm(run.device, run.dtype)) == wanted
    }


def level_of(done: Done, reference: Run, share: float = GAIN) -> float:
    """The target loss at a share of the reference's gain."""
    before = float(done[reference.key].result["target_before"])
    return before - share * (before - point(done, reference)[0])


def added_at(level: float, curve: Mapping[float, Point], source_before: float) -> float | None:
    """What a curve adds to the source's loss where it has this target loss.

    Over rates or strengths: interpolated between the two neighbours around it, the lowest such;
    None without them.
    """
    for lower, higher in pairwise(sorted(curve)):
        (before, one), (after, two) = curve[lower], curve[higher]
        if before >= level >= after and math.isfinite(before) and before > after:
            added = one + (before - level) / (before - after) * (two - one)
            return added - source_before
    return None


def point(done: Done, run: Run) -> Point:
    """The losses of a run that was made."""
    result = done[run.key].result
    target, source = (
        math.inf if result[part] is None else float(result[part]) for part in ("target", "source")
    )
    return target, source
