# SPDX-License-Identifier: Apache-2.0
"""This study's runs: those made, and making those that are missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies import runner, store
from studies.lm.protocol import PROTOCOL, Run

RESULTS = Path(__file__).parent / "results"

Done = Mapping[str, store.Done[Run]]


def load(folder: Path = RESULTS) -> Done:
    """Every run of this protocol, by key.

    Raises:
        ValueError: If a line cannot be read, or its key is not that of its configuration, or a run
            started from another base than the others.
    """
    done = store.load(folder, Run, PROTOCOL)
    if len({entry.result["base_sha256"] for entry in done.values()}) > 1:
        raise ValueError(f"the runs in {folder} started from several base models")
    return done


def continue_runs(
    missing: Callable[[Done], Sequence[Run]],
    data: Path,
    base: Path,
    *,
    jobs: int,
    minutes: float | None,
    folder: Path = RESULTS,
) -> int:
    """Make missing runs in order until none is left or the time is over; how many were made.

    Args:
        missing: what is missing, given the runs that were made.
        data: the folder of texts and questions.
        base: the folder of the converted base, which each worker loads once.
        jobs: runs at a time.
        minutes: begin no run after so long; None for no limit.
        folder: where the runs are written, each as soon as it is made.
    """

    def record(run: Run, result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        store.append(run, result, about, folder, rate=run.rate, rank=run.rank)
        print(f"{described(run)}: {figures(result)}, {result['seconds']:.0f} s", flush=True)

    return runner.continue_runs(
        lambda: missing(load(folder)),
        functools.partial(_execute, base),
        record,
        data,
        jobs=jobs,
        minutes=minutes,
    )


def described(run: Run) -> str:
    """A run in a few words."""
    return (
        f"{run.stage} {run.device} {run.target} {run.method} {run.size or '-'} rate {run.rate:g} "
        f"seed {run.seed}"
    )


def figures(result: Mapping[str, Any]) -> str:
    """Losses before and after, in a few words."""
    return ", ".join(f"{part} {result[f'{part}_before']} -> {result[part]}" for part in PARTS)


PARTS = ("target", "source")


def _execute(base: Path, run: Run, data: Path) -> runner.Outcome:
    from benchmarks.environment import describe
    from studies.lm.train import execute

    return execute(run, data, base), describe()
