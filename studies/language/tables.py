# SPDX-License-Identifier: Apache-2.0
"""The committed runs as Markdown tables: a figure stands there only where all its runs exist.

Losses are in nats a token; a perplexity is the exponential of one, and the mean of perplexities
over texts is the exponential of the mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from studies.accuracy.tables import NOT_YET, markdown
from studies.language.cells import chosen, final_runs, loss_of
from studies.language.frontier import level, source_at
from studies.language.plan import plan
from studies.language.protocol import METHODS, TARGETS, rate_of
from studies.language.store import Done

REFERENCE = "lora"
PARTS = ("target", "source")


def base(made: Mapping[str, Any] | None) -> str:
    """What making the base gave."""
    columns = ["base model", "value"]
    if made is None:
        return markdown(columns, [["not made yet", NOT_YET]])
    return markdown(
        columns,
        [
            ["parameters", f"{made['parameters']:,}"],
            ["tokens of the source trained on, different ones", f"{made['training_tokens']:,}"],
            ["perplexity, source validation", f"{math.exp(made['validation_loss']):.1f}"],
            ["perplexity, source test", f"{math.exp(made['test_loss']):.1f}"],
            ["step that was kept", f"{made['kept_step']:,}"],
            ["seconds, one thread of a busy machine", f"{made['seconds']:.0f}"],
            ["sha256 of the weights", f"`{made['model_sha256'][:16]}`..."],
        ],
    )


def progress(done: Mapping[str, Done]) -> str:
    """Runs made and missing, target by target."""
    rows = []
    for target in TARGETS:
        left = plan(done, [target])
        made = [entry.run.stage for entry in done.values() if entry.run.target == target]
        missing = {
            "tuning": len(left.tuning),
            "frontier": len(left.frontier),
            "final": len(left.final) + left.unknown_finals,
        }
        counts = [f"{made.count(stage)} / {number}" for stage, number in missing.items()]
        rows.append([target, *counts])
    stages = ["tuning", "frontier", "final"]
    return markdown(["target", *(f"{stage}: made / missing" for stage in stages)], rows)


def rates(done: Mapping[str, Done]) -> str:
    """The rate of each cell whose tuning is complete; * where it is the lowest or highest tried."""
    rows = []
    for method in METHODS:
        row = [method]
        for target in TARGETS:
            exponent = chosen(done, target, method)
            row.append(NOT_YET if exponent is None else _rate(done, target, method, exponent))
        rows.append(row)
    return markdown(["method", *TARGETS], rows)


def perplexities(done: Mapping[str, Done], part: str) -> str:
    """Test perplexity of target or source: mean and standard deviation over the final seeds."""
    before = [_before(done, target, part) for target in TARGETS]
    whole = None not in before
    row = [NOT_YET if loss is None else _perplexity([loss]) for loss in before]
    overall = _perplexity([mean(loss for loss in before if loss is not None)]) if whole else NOT_YET
    rows = [["the base, before", *row, overall]]
    for method in METHODS:
        losses = [final_losses(done, target, method, part) for target in TARGETS]
        row = [NOT_YET if seeds is None else _perplexity(seeds) for seeds in losses]
        complete = [seeds for seeds in losses if seeds is not None]
        if len(complete) == len(TARGETS):
            row.append(_perplexity([_mean(seed) for seed in zip(*complete, strict=True)]))
        else:
            row.append(NOT_YET)
        rows.append([method, *row])
    return markdown(["method", *TARGETS, "geometric mean"], rows)


def paired(done: Mapping[str, Done]) -> str:
    """Each method minus LoRA on the test texts: pairs of one target and one seed, in nats.

    The mean of the targets' differences and its standard deviation over the seeds, and in how many
    pairs the method's loss is lower, level, higher.
    """
    rows = []
    for method in METHODS:
        if method != REFERENCE:
            cells = [_compared(paired_differences(done, method, part)) for part in PARTS]
            rows.append([method, *cells[0], *cells[1]])
    names = [
        f"{part}: {what}" for part in PARTS for what in ("difference", "lower / level / higher")
    ]
    return markdown(["method", *names], rows)


def frontier(done: Mapping[str, Done]) -> str:
    """Source perplexity where every method has come equally far on the target."""
    levels = [level(done, target) for target in TARGETS]
    row = [NOT_YET if value is None else f"at {math.exp(value):.0f}" for value in levels]
    rows = [["target perplexity", *row]]
    for method in METHODS:
        losses = [source_at(done, target, method) for target in TARGETS]
        rows.append([method, *(NOT_YET if v is None else _perplexity([v]) for v in losses)])
    return markdown(["method", *TARGETS], rows)


def final_losses(
    done: Mapping[str, Done], target: str, method: str, part: str
) -> list[float] | None:
    """Test loss of each final seed; None while a run of the cell is missing. inf: not finite."""
    runs = final_runs(done, target, method)
    if runs is None or any(run.key not in done for run in runs):
        return None
    return [loss_of(done[run.key], f"{part}_test") for run in runs]


def paired_differences(
    done: Mapping[str, Done], method: str, part: str
) -> list[list[float]] | None:
    """For each final seed the difference on every target; None while a run is missing."""
    by_target = []
    for target in TARGETS:
        ours = final_losses(done, target, method, part)
        theirs = final_losses(done, target, REFERENCE, part)
        if ours is None or theirs is None:
            return None
        by_target.append([a - b for a, b in zip(ours, theirs, strict=True)])
    return [list(seed) for seed in zip(*by_target, strict=True)]


def _compared(differences: list[list[float]] | None) -> list[str]:
    if differences is None:
        return [NOT_YET, NOT_YET]
    signs = [round(value, 5) for seed in differences for value in seed]
    counts = (sum(s < 0 for s in signs), sum(s == 0 for s in signs), sum(s > 0 for s in signs))
    means = [mean(seed) for seed in differences]
    return [f"{mean(means):+.3f} ± {stdev(means):.3f}", " / ".join(map(str, counts))]


def _before(done: Mapping[str, Done], target: str, part: str) -> float | None:
    for entry in done.values():
        if entry.run.stage == "final" and entry.run.target == target:
            value: float | None = entry.result[f"{part}_test_before"]
            return value
    return None


def _mean(losses: Sequence[float]) -> float:
    return math.inf if math.inf in losses else mean(losses)


def _perplexity(losses: Sequence[float]) -> str:
    if max(losses) > 30:
        return "lost"
    values = [math.exp(loss) for loss in losses]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _rate(done: Mapping[str, Done], target: str, method: str, exponent: int) -> str:
    tried = {
        entry.run.rate_exponent
        for entry in done.values()
        if (entry.run.stage, entry.run.target, entry.run.method) == ("tuning", target, method)
    }
    edge = " *" if exponent in (min(tried), max(tried)) else ""
    return f"{rate_of(exponent):g}{edge}"
