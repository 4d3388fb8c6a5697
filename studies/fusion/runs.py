# SPDX-License-Identifier: Apache-2.0
"""This study's runs: those made, those missing, and making them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import runner, store
from studies.accuracy import store as accuracy
from studies.accuracy.plan import chosen
from studies.fusion.protocol import FAMILIES, PROTOCOL, SEEDS, SIZE, Run

RESULTS = Path(__file__).parent / "results"

Done = store.Done[Run]


def load(folder: Path = RESULTS) -> dict[str, Done]:
    """Every run of this protocol, by key.

    Raises:
        ValueError: If a line cannot be read, or its key is not that of its configuration.
    """
    return store.load(folder, Run, PROTOCOL)


def wanted(rates: Mapping[str, accuracy.Done]) -> list[Run]:
    """Every run, seed by seed, at the rates that the study of accuracy tuned.

    A family whose method is not tuned yet is left out.
    """
    tuned = {family: chosen(rates, method, SIZE) for family, method in FAMILIES.items()}
    return [
        Run(family, exponent, seed)
        for seed in SEEDS
        for family, exponent in tuned.items()
        if exponent is not None
    ]


def missing(folder: Path = RESULTS, rates: Path = accuracy.RESULTS) -> list[Run]:
    """Runs that could be made now."""
    made = load(folder)
    return [run for run in wanted(accuracy.load(rates)) if run.key not in made]


def continue_runs(data: Path, *, jobs: int, minutes: float | None, folder: Path = RESULTS) -> int:
    """Make missing runs until none is left or the time is over; how many were made."""

    def record(run: Run, result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        store.append(run, result, about, folder)
        print(f"{run.family} seed {run.seed}: {result['seconds']['wall']:.0f} s", flush=True)

    return runner.continue_runs(
        lambda: missing(folder), _execute, record, data, jobs=jobs, minutes=minutes
    )


def _execute(run: Run, data: Path) -> runner.Outcome:
    from benchmarks.environment import describe
    from studies.fusion.measure import execute

    return execute(run, data), describe()
