# SPDX-License-Identifier: Apache-2.0
"""Make missing runs, some at a time. One process writes; it can be ended at any moment."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")

Outcome = tuple[list[dict[str, Any]], dict[str, Any]]
"""The results of runs that were made together, and the environment they were made in."""


def continue_runs(
    missing: Callable[[], Sequence[R]],
    execute: Callable[[tuple[R, ...], Path], Outcome],
    record: Callable[[R, Mapping[str, Any], Mapping[str, Any]], None],
    data: Path,
    *,
    jobs: int,
    minutes: float | None,
    together: int = 1,
) -> int:
    """Make missing runs in order until none is left or the time is over.

    Args:
        missing: the runs that could be made now; asked again after each that was made.
        execute: makes some, in a process of one thread: a function of a module, given the runs and
            the folder of data.
        record: keeps one, in this process: given the run, its result and its environment.
        data: the folder of data.
        jobs: processes.
        minutes: begin no run after so long; None for no limit.
        together: runs at a time in a process. Where making them together fails, each of them is
            made alone.

    Returns:
        How many runs were made.

    Raises:
        RuntimeError: If runs failed, after all others were made.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    head = commit()
    made = 0
    failed: dict[str, Exception] = {}
    alone: list[R] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_worker) as pool:
        going: dict[Future[Outcome], tuple[R, ...]] = {}
        while True:
            in_time = deadline is None or time.monotonic() < deadline
            busy = [run for runs in going.values() for run in runs]
            free = [run for run in (missing() if in_time else ()) if run not in busy]
            free = [run for run in free if str(run) not in failed]
            while free and len(going) < jobs:
                runs = tuple(free[: 1 if free[0] in alone else together])
                free = free[len(runs) :]
                going[pool.submit(execute, runs, data)] = runs
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                runs = going.pop(future)
                try:
                    results, environment = future.result()
                except BrokenExecutor:
                    raise
                except Exception as error:  # the others go on
                    print(f"failed: {', '.join(map(str, runs))}: {error!r}", flush=True)
                    if len(runs) > 1:
                        alone += runs
                    else:
                        failed[str(runs[0])] = error
                    continue
                for run, result in zip(runs, results, strict=True):
                    record(run, result, {**environment, "commit": head})
                    made += 1
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, {made} were made") from failed.popitem()[1]
    return made


def execute(
    function: str, batched: bool, given: Mapping[str, Any], runs: tuple[Any, ...], data: Path
) -> Outcome:
    """Make runs by ``"module:function"``, called with the folder of data and `given`.

    And with each run, or with all of them if it is `batched`; it then returns a list of results.
    """
    from benchmarks.environment import describe

    module, _, name = function.partition(":")
    make = getattr(importlib.import_module(module), name)
    if batched:
        return make(runs, data, **given), describe()
    return [make(run, data, **given) for run in runs], describe()


def prepare_worker() -> None:
    """Settings of a worker, before torch is imported there: one thread, no network, no noise."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    from shira.cli.output import offline, quieten, share_cores

    offline()
    share_cores()
    import torch

    torch.set_num_threads(1)
    quieten(warnings_too=True)


def commit() -> str | None:
    """The commit the runs are made with, where git knows it."""
    try:
        where = Path(__file__).parent
        head = ["git", "-C", str(where), "rev-parse", "HEAD"]
        return subprocess.check_output(head, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
