# SPDX-License-Identifier: Apache-2.0
"""Make this study's missing runs: `studies.runner` with its plan, its training and its store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import runner as common
from studies.accuracy import store
from studies.accuracy.plan import plan
from studies.accuracy.protocol import Run
from studies.accuracy.store import RESULTS


def continue_runs(
    data: Path, tasks: list[str], *, jobs: int, minutes: float | None, folder: Path = RESULTS
) -> int:
    """Make missing runs in the order of the plan until none is left or the time is over.

    Args:
        data: the folder of the tasks.
        tasks: those to run.
        jobs: runs at a time, each in a process of one thread.
        minutes: begin no run after so long; None for no limit.
        folder: where the runs are written.

    Returns:
        How many runs were made.
    """

    def record(run: Run, result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        store.append(run, result, about, folder)
        print(
            f"{run.stage} {run.task} {run.method} {run.size or ''} rate {run.rate:g} "
            f"seed {run.seed}: {result['metric']} "
            f"{result['test' if run.stage == 'final' else 'validation']:.3f}, "
            f"{result['seconds']['wall']:.0f} s",
            flush=True,
        )

    return common.continue_runs(
        lambda: plan(store.load(folder), tasks).runs,
        _execute,
        record,
        data,
        jobs=jobs,
        minutes=minutes,
    )


def _execute(run: Run, data: Path) -> common.Outcome:
    from benchmarks.environment import describe
    from studies.accuracy.train import execute

    return execute(run, data), describe()
