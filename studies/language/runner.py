# SPDX-License-Identifier: Apache-2.0
"""Make the base if need be, and the missing runs: `studies.runner` with this study's parts."""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from studies import runner as common
from studies.language import base, store
from studies.language.plan import plan
from studies.language.protocol import BASE, Run


def ensure_base(data: Path, folder: Path, results: Path = store.RESULTS) -> base.Made:
    """The base model in `folder`, made and recorded where it is missing.

    Raises:
        ValueError: If it is not, to the bit, the one that is recorded: runs of two bases cannot
            be compared.
    """
    made = base.find(folder, BASE)
    if made is None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=common.prepare_worker) as pool:
            result, about = pool.submit(_make_base, data, folder).result()
        made = base.find(folder, BASE)
        assert made is not None
        if store.load_base(results) is None:
            store.append_base(result, {**about, "commit": common.commit()}, results)
    recorded = store.load_base(results)
    if recorded is None or recorded["model_sha256"] != made.model_sha256:
        raise ValueError(
            f"the base model in {folder} is not the one that {results / 'base.jsonl'} records: "
            "another processor or another torch rounds differently. Put the old results aside to "
            "begin a study of your own"
        )
    return made


def continue_runs(
    data: Path,
    made: base.Made,
    targets: list[str],
    *,
    jobs: int,
    minutes: float | None,
    results: Path = store.RESULTS,
) -> int:
    """Make missing runs in the order of the plan until none is left or the time is over.

    Args:
        data: the folder of data.
        made: the base model.
        targets: those to run.
        jobs: runs at a time, each in a process of one thread.
        minutes: begin no run after so long; None for no limit.
        results: where the runs are written.

    Returns:
        How many runs were made.
    """

    def record(run: Run, result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        store.append(run, result, about, results)
        part = "test" if run.stage == "final" else "validation"
        print(
            f"{run.stage} {run.target} {run.method} rate {run.rate:g} seed {run.seed}: perplexity "
            f"{_perplexity(result[f'target_{part}'])}, of the source "
            f"{_perplexity(result[f'source_{part}'])}, {result['seconds']:.0f} s",
            flush=True,
        )

    return common.continue_runs(
        lambda: plan(store.load(results), targets).runs,
        functools.partial(_execute, made),
        record,
        data,
        jobs=jobs,
        minutes=minutes,
    )


def _perplexity(loss: float | None) -> str:
    return "not finite" if loss is None else f"{math.exp(min(loss, 100)):.1f}"


def _execute(made: base.Made, run: Run, data: Path) -> common.Outcome:
    from benchmarks.environment import describe
    from studies.language.train import execute

    return execute(run, data, made), describe()


def _make_base(data: Path, folder: Path) -> common.Outcome:
    from benchmarks.environment import describe

    return base.make(data, folder, BASE, functools.partial(print, flush=True)), describe()
