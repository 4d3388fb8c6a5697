# SPDX-License-Identifier: Apache-2.0
"""The committed runs as Markdown tables: a figure stands there only where all its runs exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from studies.accuracy.plan import chosen, final_runs, plan, tuning_runs, validation
from studies.accuracy.protocol import SIZES, TASKS, cells, rate_of
from studies.accuracy.runs import Done
from studies.page import NOT_YET, markdown

REFERENCE = "lora"
ACCURACIES = [task for task, metric in TASKS.items() if metric == "accuracy"]


def progress(done: Mapping[str, Done]) -> str:
    """Runs made and missing, by stage."""
    left = plan(done)
    made = [entry.run.stage for entry in done.values()]
    missing = {"tuning": len(left.tuning), "final": len(left.final) + left.unknown_finals}
    rows = [[stage, str(made.count(stage)), str(count)] for stage, count in missing.items()]
    return markdown(["runs", "made", "missing"], rows)


def rates(done: Mapping[str, Done]) -> str:
    """The rate of each cell that is tuned, and its figure beside those of its neighbours.

    A neighbour that was not tried is a `-`.
    """
    rows = []
    for method, size in cells():
        tried = validation(done, tuning_runs(done, method, size))
        exponent = chosen(done, method, size)
        row = [method, size or ""]
        if exponent is None:
            rows.append([*row, *[NOT_YET] * 4])
            continue
        near = [tried.get(exponent + step) for step in (-1, 0, 1)]
        figures = [NOT_YET if figure is None else f"{100 * figure:.1f}" for figure in near]
        rows.append([*row, f"{rate_of(exponent):g}", *figures])
    columns = ["method", "size", "rate", "a half decade lower", "at the rate", "higher"]
    return markdown(columns, rows)


def finals(done: Mapping[str, Done]) -> str:
    """Test figure of each cell: mean and standard deviation over the final seeds."""
    rows = []
    for method, size in cells():
        row = [method, size or ""]
        by_task = {task: final_figures(done, task, method, size) for task in TASKS}
        for figures in by_task.values():
            row.append(NOT_YET if figures is None else spread(figures))
        for tasks in (list(TASKS), ACCURACIES):
            figures_of = [by_task[task] for task in tasks]
            complete = [figures for figures in figures_of if figures is not None]
            whole = len(complete) == len(tasks)
            row.append(
                spread([mean(seed) for seed in zip(*complete, strict=True)]) if whole else NOT_YET
            )
        rows.append(row)
    return markdown(["method", "size", *TASKS, "mean of tasks", "mean of accuracies"], rows)


def paired(done: Mapping[str, Done]) -> str:
    """Each method minus LoRA of its size: pairs of one task and one seed.

    The mean of the tasks' differences and its standard deviation over the seeds, and in how many
    pairs the method is above, level, below. ``both``: over the seeds of the two sizes.
    """
    rows = []
    for method, size in cells():
        for against in [size] if size else list(SIZES):
            if method != REFERENCE:
                differences = paired_differences(done, method, size, against)
                rows.append([method, size or "", f"{REFERENCE} {against}", *_compared(differences)])
    for method in dict.fromkeys(method for method, size in cells() if size):
        if method != REFERENCE:
            of_sizes = [paired_differences(done, method, size, size) for size in SIZES]
            complete = [differences for differences in of_sizes if differences is not None]
            together = None if len(complete) < len(SIZES) else [x for d in complete for x in d]
            rows.append([method, "both", f"{REFERENCE}, the same", *_compared(together)])
    columns = ["method", "size", "against", "mean difference", "above / level / below"]
    return markdown(columns, rows)


def final_figures(
    done: Mapping[str, Done], task: str, method: str, size: str | None
) -> list[float] | None:
    """The test figure of each final seed; None while a run of the cell is missing."""
    exponent = chosen(done, method, size)
    if exponent is None:
        return None
    runs = final_runs(task, method, size, exponent)
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


def _compared(differences: list[list[float]] | None) -> list[str]:
    if differences is None:
        return [NOT_YET, NOT_YET]
    signs = [round(value, 6) for seed in differences for value in seed]
    counts = (sum(s > 0 for s in signs), sum(s == 0 for s in signs), sum(s < 0 for s in signs))
    return [spread([mean(seed) for seed in differences]), " / ".join(map(str, counts))]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f}"
