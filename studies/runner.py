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

Outcome = tuple[dict[str, Any], dict[str, Any]]
"""The result of a run, and the environment it was made in."""


def continue_runs(
    missing: Callable[[], Sequence[R]],
    execute: Callable[[R, Path], Outcome],
    record: Callable[[R, Mapping[str, Any], Mapping[str, Any]], None],
    data: Path,
    *,
    jobs: int,
    minutes: float | None,
) -> int:
    """Make missing runs in order until none is left or the time is over.

    Args:
        missing: the runs that could be made now; asked again after each that was made.
        execute: makes one, in a process of one thread: a function of a module, given the run and
            the folder of data.
        record: keeps it, in this process: given the run, its result and its environment.
        data: the folder of data.
        jobs: runs at a time.
        minutes: begin no run after so long; None for no limit.

    Returns:
        How many runs were made.

    Raises:
        RuntimeError: If runs failed, after all others were made.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    head = commit()
    made = 0
    failed: dict[str, Exception] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_worker) as pool:
        going: dict[Future[Outcome], R] = {}
        while True:
            in_time = deadline is None or time.monotonic() < deadline
            for run in missing() if in_time else ():
                if len(going) == jobs:
                    break
                if run not in going.values() and str(run) not in failed:
                    going[pool.submit(execute, run, data)] = run
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                run = going.pop(future)
                try:
                    result, environment = future.result()
                except BrokenExecutor:
                    raise
                except Exception as error:  # the others go on
                    print(f"failed: {run}: {error!r}", flush=True)
                    failed[str(run)] = error
                    continue
                record(run, result, {**environment, "commit": head})
                made += 1
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, {made} were made") from failed.popitem()[1]
    return made


def execute(function: str, given: Mapping[str, Any], run: Any, data: Path) -> Outcome:
    """Make a run by ``"module:function"``, called with the run, the folder of data and `given`."""
    from benchmarks.environment import describe

    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(run, data, **given), describe()


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
