# SPDX-License-Identifier: Apache-2.0
"""This study's runs: those made, and those wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from studies import store
from studies.accuracy import runs as accuracy
from studies.accuracy.plan import chosen
from studies.fusion.protocol import FAMILIES, PROTOCOL, SEEDS, SIZE, Run
from studies.study import Study

Done = store.Done[Run]

STUDY = Study(
    results=Path(__file__).parent / "results",
    make=Run,
    protocol=PROTOCOL,
    execute="studies.fusion.measure:execute",
    said=lambda run, _: f"{run.family} seed {run.seed}",
)


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


def missing(made: Mapping[str, Done], rates: Path | None = None) -> list[Run]:
    """Runs that could be made now."""
    return [run for run in wanted(accuracy.STUDY.load(rates)) if run.key not in made]
