# SPDX-License-Identifier: Apache-2.0
"""Make the missing runs, some at a time. One process writes; it can be ended at any moment."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

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
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    about = _about()
    made = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare) as pool:
        going: dict[Future[tuple[dict[str, Any], dict[str, Any]]], Run] = {}
        while True:
            in_time = deadline is None or time.monotonic() < deadline
            missing = plan(store.load(folder), tasks)
            for run in missing.runs if in_time else []:
                if len(going) == jobs:
                    break
                if run not in going.values():
                    going[pool.submit(_execute, run, data)] = run
            if not going:
                return made
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                result, environment = future.result()
                store.append(run, result, {**environment, **about}, folder)
                made += 1
                print(
                    f"{run.stage} {run.task} {run.method} {run.size or ''} rate {run.rate:g} "
                    f"seed {run.seed}: {result['metric']} {result['validation']:.3f}, "
                    f"{result['seconds']:.0f} s",
                    flush=True,
                )


def _prepare() -> None:
    """Settings of a worker, before torch is imported there."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    from shira.cli import quiet

    quiet.offline()
    quiet.share_cores()
    import torch

    torch.set_num_threads(1)
    quiet.quiet(warnings_too=True)


def _execute(run: Run, data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from benchmarks.environment import describe
    from studies.accuracy.train import execute

    return execute(run, data), describe()


def _about() -> dict[str, Any]:
    """The commit the runs are made with, where git knows it."""
    try:
        where = Path(__file__).parent
        head = ["git", "-C", str(where), "rev-parse", "HEAD"]
        commit = subprocess.check_output(head, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"commit": commit}
