# SPDX-License-Identifier: Apache-2.0
"""The committed runs as Markdown tables: a figure stands there only where all its runs exist.

Losses are in nats a token. Intervals are of 95 %, Student's, over the final seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev

from studies.lm.plan import (
    FIRST,
    Point,
    added_at,
    at_equal_gain,
    best_low_rank,
    curve,
    entered,
    finalists,
    point,
    screened,
    tuned,
    tuning_runs,
)
from studies.lm.protocol import (
    CHOICES,
    FINAL_SEEDS,
    GAIN,
    METHODS,
    SETS,
    SIZES,
    TARGETS,
    TUNING_TARGETS,
    Arm,
    Run,
    rate_of,
)
from studies.lm.runs import Done
from studies.page import NOT_YET, markdown

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % quantile of Student's t, by the number of seeds."""


def screen(done: Done, arm: Arm) -> str:
    """Each method at the best of its rates on the screen, and how many of them were tried.

    Beside it what it adds to the source's loss at `GAIN` of LoRA's gain, over its rates. Of a
    method whose screen is not complete only the number of rates is told.
    """
    target = TUNING_TARGETS[0]
    loras, lora = screened(done, arm, "lora")
    rows: list[list[str]] = []
    for method in METHODS:
        exponents, best = screened(done, arm, method)
        made = curve(done, arm, method, FIRST, target)
        points = {exponent: made[exponent] for exponent in exponents if exponent in made}
        if not points:
            continue
        (run,) = tuning_runs(arm, method, FIRST, min(points), [target])
        cells = [NOT_YET] * 5
        if best is not None:
            cells[:3] = [f"{rate_of(best):g}", *map(_loss, points[best])]
            if lora is not None:
                added, of_lora = (
                    at_equal_gain(done, arm, each, FIRST, target, ("lora", lora), rates)
                    for each, rates in ((method, exponents), ("lora", loras))
                )
                if added is not None:
                    cells[3] = f"{added:+.3f}" if math.isfinite(added) else "lost"
                    cells[4] = _share(added, of_lora)
        rows.append([method, f"{len(points)}", *cells])
    if rows:  # of the last, for `full` measures the base in float32
        result = done[run.key].result
        before = [f"{result[f'{part}_before']:.3f}" for part in ("target", "source")]
        rows.insert(0, ["the base", "", "", *before, "", ""])
    columns = ["method", "rates", "the best", f"{target}", "source"]
    return markdown([*columns, f"added to it at {GAIN:.0%} of LoRA's gain", "of LoRA's"], rows)


def tuning(done: Done, arm: Arm) -> str:
    """Each tuned method at its best rate: validation losses of the targets and of the source.

    Beside them what is added to the source's loss at equal gain, the mean of the targets.
    """
    rows = []
    for size in SIZES:
        reference = best_low_rank(done, arm, size)
        of_reference = None if reference is None else tuned(done, arm, reference, size)[1]
        for method in entered(done, arm, size) or ():
            exponent = tuned(done, arm, method, size)[1]
            if exponent is None:
                continue
            runs = tuning_runs(arm, method, size, exponent)
            points = [point(done, run) for run in runs]
            found: list[float | None] = [None]
            if reference is not None and of_reference is not None:
                against = (reference, of_reference)
                found = [
                    at_equal_gain(done, arm, method, size, run.target, against) for run in runs
                ]
            added = [value for value in found if value is not None]
            by_target = {run.target: _loss(point(done, run)[0]) for run in runs}
            rows.append(
                [
                    method,
                    size,
                    f"{rate_of(exponent):g}",
                    *(by_target.get(target, "") for target in TUNING_TARGETS),
                    _loss(mean(target for target, _ in points)),
                    _loss(mean(source for _, source in points)),
                    f"{mean(added):+.3f}" if len(added) == len(found) else NOT_YET,
                ]
            )
    columns = ["method", "size", "rate", *TUNING_TARGETS, "mean", "source, mean"]
    return _table([*columns, f"added to it at {GAIN:.0%} of the gain"], rows)


def finals(done: Done, arm: Arm) -> str:
    """Test losses at the chosen rates: mean and interval over the seeds; the mean over targets."""
    columns = ["method", "size", *TARGETS, "mean", "added to the source", "accuracy"]
    rows = []
    for size in SIZES:
        for method in finalists(done, arm, size) or ():
            of_targets = [final_figures(done, arm, method, size, t, _target) for t in TARGETS]
            added = [final_figures(done, arm, method, size, t, _added) for t in TARGETS]
            hits = final_figures(done, arm, method, size, CHOICES, _accuracy)
            cells_ = [NOT_YET if values is None else spread(values) for values in of_targets]
            cells_ += [over_targets(values) for values in (of_targets, added)]
            cells_.append(NOT_YET if hits is None else spread(hits, digits=1))
            rows.append([method, size, *cells_])
    return _table(columns, rows)


def paired(done: Done, arm: Arm) -> str:
    """Each of ours against the best low-rank method of its size: pairs of one target and seed.

    The difference of the target losses at the chosen rates; what is added to the source's loss at
    equal gain, its difference, and its share of what the low-rank method adds.
    """
    columns = ["method", "size", "against", "target", "source at equal gain", "the share"]
    rows = []
    for size in SIZES:
        reference = best_low_rank(done, arm, size)
        for method in finalists(done, arm, size) or ():
            if reference is None or method == reference:
                continue
            cells_ = [NOT_YET] * 3
            ours = [final_figures(done, arm, method, size, t, _target) for t in TARGETS]
            theirs = [final_figures(done, arm, reference, size, t, _target) for t in TARGETS]
            if (difference := _differences(ours, theirs)) is not None:
                cells_[0] = spread(difference, sign="+")
            ours = [_at_equal_gain(done, arm, method, size, t, reference) for t in TARGETS]
            theirs = [_at_equal_gain(done, arm, reference, size, t, reference) for t in TARGETS]
            if (difference := _differences(ours, theirs)) is not None:
                cells_[1] = spread(difference, sign="+")
                sums = [sum(sum(v) for v in values if v is not None) for values in (ours, theirs)]
                cells_[2] = _share(*sums)
            rows.append([method, size, reference, *cells_])
    return _table(columns, rows)


def final_figures(
    done: Done,
    arm: Arm,
    method: str,
    size: str,
    target: str,
    figure: Callable[[Done, Run], float],
) -> list[float] | None:
    """A figure of each final seed at the chosen rate; None while a run is missing."""
    exponent = tuned(done, arm, method, size)[1]
    if exponent is None:
        return None
    runs = [arm.run("final", target, method, size, exponent, seed) for seed in FINAL_SEEDS]
    if any(run.key not in done for run in runs):
        return None
    return [figure(done, run) for run in runs]


def over_targets(of_targets: Sequence[Sequence[float] | None]) -> str:
    """The mean over all targets, and its interval over the seeds."""
    values = [each for each in of_targets if each is not None]
    if len(values) < len(of_targets):
        return NOT_YET
    return spread([mean(seed) for seed in zip(*values, strict=True)])


def spread(values: Sequence[float], *, sign: str = "", digits: int = 3) -> str:
    """Mean and 95 % interval."""
    if not all(map(math.isfinite, values)):
        return "lost"
    half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{sign}.{digits}f} ± {half:.{digits}f}"


def _at_equal_gain(
    done: Done, arm: Arm, method: str, size: str, target: str, reference: str
) -> list[float] | None:
    """What is added to the source's test loss, seed by seed; None where one cannot be told."""
    best, of_reference = (tuned(done, arm, each, size)[1] for each in (method, reference))
    if best is None or of_reference is None:
        return None
    found = []
    for seed in FINAL_SEEDS:
        goal = arm.run("final", target, reference, size, of_reference, seed)
        run = arm.run("final", target, method, size, best, seed)
        if goal.key not in done or run.key not in done:
            return None
        added = added_at(done, goal, strengths(done, run))
        if added is None:
            return None
        found.append(added)
    return found


def _differences(
    ours: Sequence[Sequence[float] | None], theirs: Sequence[Sequence[float] | None]
) -> list[float] | None:
    """Seed by seed the mean over the targets of the difference; None while one is missing."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if len(pairs) < len(ours):
        return None
    by_target = [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]
    return [mean(seed) for seed in zip(*by_target, strict=True)]


def strengths(done: Done, run: Run) -> dict[float, Point]:
    """The losses on target and source by the share of a final run's adapter that is in it."""
    result = done[run.key].result
    curve = {float(strength): (t, s) for strength, (t, s) in result["strengths"].items()}
    return {
        0.0: (result["target_before"], result["source_before"]),
        **{strength: (t, s) for strength, (t, s) in curve.items() if t is not None is not s},
        1.0: point(done, run),
    }


def _target(done: Done, run: Run) -> float:
    return point(done, run)[0]


def _added(done: Done, run: Run) -> float:
    return point(done, run)[1] - float(done[run.key].result["source_before"])


def _accuracy(done: Done, run: Run) -> float:
    """Percent right, the mean of the sets."""
    return 100 * mean(done[run.key].result["accuracy"][name] for name in SETS)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(columns, rows) if rows else "The rates that it needs are not known yet."


def _share(ours: float, theirs: float | None) -> str:
    """What is added as a share of what the low-rank method adds, if that is more than nothing."""
    if theirs is None or not (theirs > 0 and math.isfinite(ours) and math.isfinite(theirs)):
        return NOT_YET
    return f"{ours / theirs:.2f}"


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "lost"
