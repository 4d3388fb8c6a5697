# SPDX-License-Identifier: Apache-2.0
"""The committed runs as Markdown tables: a figure stands there only where all its runs exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from studies.accuracy.plan import chosen, plan
from studies.accuracy.protocol import FINAL_SEEDS, GRIDS, SIZES, TASKS, Run, cells, rate_of
from studies.accuracy.store import Done

NOT_YET = "-"
REFERENCE = "lora"


def progress(done: Mapping[str, Done]) -> str:
    """Runs made and missing, task by task."""
    rows = []
    for task in TASKS:
        left = plan(done, [task])
        made = [entry.run for entry in done.values() if entry.run.task == task]
        rows.append(
            [
                task,
                *(
                    f"{sum(run.stage == stage for run in made)} / {missing}"
                    for stage, missing in (
                        ("tuning", len(left.tuning)),
                        ("final", len(left.final) + left.unknown_finals),
                    )
                ),
            ]
        )
    return markdown(["task", "tuning: made / missing", "final: made / missing"], rows)


def rates(done: Mapping[str, Done]) -> str:
    """The rate of each cell whose tuning is complete; * where it is the lowest or highest tried."""
    rows = []
    for method, size in cells():
        row = [method, size or ""]
        for task in TASKS:
            exponent = chosen(done, task, method, size)
            row.append(NOT_YET if exponent is None else _rate(done, task, method, size, exponent))
        rows.append(row)
    return markdown(["method", "size", *TASKS], rows)


def finals(done: Mapping[str, Done]) -> str:
    """Test figure of each cell: mean and standard deviation over the final seeds."""
    rows = []
    for method, size in cells():
        row = [method, size or ""]
        by_task = {task: final_figures(done, task, method, size) for task in TASKS}
        for figures in by_task.values():
            row.append(NOT_YET if figures is None else _spread(figures))
        complete = [figures for figures in by_task.values() if figures is not None]
        whole = len(complete) == len(TASKS)
        row.append(
            _spread([mean(seed) for seed in zip(*complete, strict=True)]) if whole else NOT_YET
        )
        rows.append(row)
    return markdown(["method", "size", *TASKS, "mean of tasks"], rows)


def paired(done: Mapping[str, Done]) -> str:
    """Each method minus LoRA of its size: pairs of one task and one seed.

    The mean of the tasks' differences and its standard deviation over the seeds, and in how many
    pairs the method is above, level, below.
    """
    rows = []
    for method, size in cells():
        for against in [size] if size else list(SIZES):
            if method != REFERENCE:
                differences = paired_differences(done, method, size, against)
                rows.append([method, size or "", f"{REFERENCE} {against}", *_compared(differences)])
    columns = ["method", "size", "against", "mean difference", "above / level / below"]
    return markdown(columns, rows)


def final_figures(
    done: Mapping[str, Done], task: str, method: str, size: str | None
) -> list[float] | None:
    """The test figure of each final seed; None while a run of the cell is missing."""
    exponent = chosen(done, task, method, size)
    if exponent is None:
        return None
    runs = [Run("final", task, method, size, exponent, seed) for seed in FINAL_SEEDS]
    if any(run.key not in done for run in runs):
        return None
    return [done[run.key].result["test"] for run in runs]


def paired_differences(
    done: Mapping[str, Done], method: str, size: str | None, against: str
) -> list[list[float]] | None:
    """For each final seed the difference on every task; None while one of the runs is missing."""
    by_task = []
    for task in TASKS:
        ours = final_figures(done, task, method, size)
        theirs = final_figures(done, task, REFERENCE, against)
        if ours is None or theirs is None:
            return None
        by_task.append([a - b for a, b in zip(ours, theirs, strict=True)])
    return [list(seed) for seed in zip(*by_task, strict=True)]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, first column to the left, the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _compared(differences: list[list[float]] | None) -> list[str]:
    if differences is None:
        return [NOT_YET, NOT_YET]
    signs = [round(value, 6) for seed in differences for value in seed]
    counts = (sum(s > 0 for s in signs), sum(s == 0 for s in signs), sum(s < 0 for s in signs))
    return [_spread([mean(seed) for seed in differences]), " / ".join(map(str, counts))]


def _rate(done: Mapping[str, Done], task: str, method: str, size: str | None, exponent: int) -> str:
    tried = {
        entry.run.rate_exponent
        for entry in done.values()
        if (entry.run.stage, entry.run.task, entry.run.method, entry.run.size)
        == ("tuning", task, method, size)
    } | set(GRIDS[method])
    edge = " *" if exponent in (min(tried), max(tried)) else ""
    return f"{rate_of(exponent):g}{edge}"


def _spread(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"
