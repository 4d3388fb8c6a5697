# SPDX-License-Identifier: Apache-2.0
"""results/*.jsonl: this study's runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import store
from studies.accuracy.protocol import PROTOCOL, Run
from studies.study import Study

Done = store.Done[Run]


def _said(run: Run, result: Mapping[str, Any]) -> str:
    figure = result["test" if run.stage == "final" else "validation"]
    return (
        f"{run.stage} {run.task} {run.method} {run.size or ''} rate {run.rate:g} seed {run.seed}: "
        f"{result['metric']} {figure:.3f}"
    )


STUDY = Study(
    results=Path(__file__).parent / "results",
    make=Run,
    protocol=PROTOCOL,
    execute="studies.accuracy.train:execute",
    said=_said,
    derived=("rate", "rank"),
)
