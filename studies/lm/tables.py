# SPDX-License-Identifier: Apache-2.0
"""The committed runs as Markdown tables: a figure stands there only where all its runs exist.

Losses are in nats a token. Intervals are of 95 %, Student's, over the final seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

from studies.lm.plan import (
    FIRST,
    Point,
    added_at,
    at_equal_gain,
    best_low_rank,
    curve,
    entered,
    final_runs,
    finalists,
    level_of,
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

GAINS = (0.75, GAIN, 0.9)
"""Shares of the best low-rank method's gain at which the source is compared in the finals."""

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
    """Test losses at the chosen rates: mean and interval over the seeds; the mean over targets.

    What is added to the source's loss stands there twice: at the chosen rate, and scaled to `GAIN`
    of what the best low-rank method gains.
    """
    columns = ["method", "size", "seeds", *TARGETS, "mean", "added to the source"]
    columns += [f"added at {GAIN:.0%} of the gain", "accuracy"]
    rows = []
    for size in SIZES:
        reference, by_method = best_low_rank(done, arm, size), complete(done, arm, size)
        for method, by_seed in by_method.items():
            losses = [[point(done, run)[0] for run in runs] for runs in by_seed]
            added = [[_added(done, run) for run in runs] for runs in by_seed]
            hits = [_accuracy(done, runs[TARGETS.index(CHOICES)]) for runs in by_seed]
            cells_ = [spread([seed[i] for seed in losses]) for i in range(len(TARGETS))]
            cells_ += [spread([mean(seed) for seed in values]) for values in (losses, added)]
            if reference is None:
                cells_.append(NOT_YET)
            else:
                pairs = _pairs(by_seed, by_method[reference])
                scaled = [[_added_at_gain(done, *pair, GAIN) for pair in seed] for seed in pairs]
                cells_.append(_over_targets(scaled))
            rows.append([method, size, f"{len(by_seed)}", *cells_, spread(hits, digits=1)])
    return _table(columns, rows)


def paired(done: Done, arm: Arm) -> str:
    """Each method against the best low-rank one of its size: pairs of one target and seed.

    The difference of the target losses at the chosen rates, and of what is added to the source's
    loss where both are scaled to a share of the low-rank one's gain.
    """
    columns = ["method", "size", "seeds", "against", "target"]
    columns += [f"source at {share:.0%} of the gain" for share in GAINS]
    rows = []
    for size in SIZES:
        reference, by_method = best_low_rank(done, arm, size), complete(done, arm, size)
        for method, by_seed in by_method.items():
            if reference is None or method == reference:
                continue
            pairs = _pairs(by_seed, by_method[reference])
            losses = [mean(point(done, o)[0] - point(done, t)[0] for o, t in p) for p in pairs]
            cells_ = [spread(losses, sign="+")]
            for share in GAINS:
                more = [[_more_at_gain(done, *pair, share) for pair in seed] for seed in pairs]
                cells_.append(_over_targets(more, sign="+"))
            rows.append([method, size, f"{len(pairs)}", reference, *cells_])
    return _table(columns, rows)


def complete(done: Done, arm: Arm, size: str) -> dict[str, list[list[Run]]]:
    """The final runs of a size by method, seed and target: of the seeds that all methods made."""
    methods = finalists(done, arm, size) or ()
    found: dict[str, list[list[Run]]] = {method: [] for method in methods}
    for seed in FINAL_SEEDS:
        of_seed = {method: final_runs(done, arm, size, [method], [seed]) for method in methods}
        if all(run.key in done for runs in of_seed.values() for run in runs):
            for method, runs in of_seed.items():
                found[method].append(runs)
    return found


def spread(values: Sequence[float], *, sign: str = "", digits: int = 3) -> str:
    """Mean and 95 % interval; no interval of a single value."""
    if not values:
        return NOT_YET
    if not all(map(math.isfinite, values)):
        return "lost"
    if len(values) == 1:
        return f"{values[0]:{sign}.{digits}f}"
    half = STUDENT[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{sign}.{digits}f} ± {half:.{digits}f}"


Seeds = Sequence[Sequence[Run]]
"""Final runs by seed and target."""


def _pairs(ours: Seeds, theirs: Seeds) -> list[list[tuple[Run, Run]]]:
    return [list(zip(*seed, strict=True)) for seed in zip(ours, theirs, strict=True)]


def _over_targets(seeds: Sequence[Sequence[float | None]], *, sign: str = "") -> str:
    """The mean over the targets, and its interval over the seeds, if all are known."""
    known = [[value for value in seed if value is not None] for seed in seeds]
    whole = all(len(some) == len(every) for some, every in zip(known, seeds, strict=True))
    return spread([*map(mean, known)], sign=sign) if whole else NOT_YET


def _more_at_gain(done: Done, run: Run, reference: Run, share: float) -> float | None:
    """What a run adds to the source's loss more than the reference, at a share of its gain."""
    ours, theirs = (_added_at_gain(done, each, reference, share) for each in (run, reference))
    return None if ours is None or theirs is None else ours - theirs


def _added_at_gain(done: Done, run: Run, reference: Run, share: float) -> float | None:
    """What a run, scaled to a share of the reference's gain, adds to the source's loss.

    None where it does not come so far.
    """
    before = done[run.key].result["source_before"]
    return added_at(level_of(done, reference, share), strengths(done, run), before)


def strengths(done: Done, run: Run) -> dict[float, Point]:
    """The losses on target and source by the share of a final run's adapter that is in it."""
    result = done[run.key].result
    curve = {float(strength): (t, s) for strength, (t, s) in result["strengths"].items()}
    return {
        0.0: (result["target_before"], result["source_before"]),
        **{strength: (t, s) for strength, (t, s) in curve.items() if t is not None is not s},
        1.0: point(done, run),
    }


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
