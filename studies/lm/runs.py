# SPDX-License-Identifier: Apache-2.0
"""results/*.jsonl: this study's runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import store
from studies.lm.protocol import PROTOCOL, Run
from studies.study import Study

Done = Mapping[str, store.Done[Run]]


def described(run: Run) -> str:
    """A run in a few words."""
    return (
        f"{run.stage} {run.device} {run.target} {run.method} {run.size or '-'} rate {run.rate:g} "
        f"seed {run.seed}"
    )


def _said(run: Run, result: Mapping[str, Any]) -> str:
    parts = ("target", "source")
    figures = (f"{part} {result[f'{part}_before']} -> {result[part]}" for part in parts)
    return f"{described(run)}: {', '.join(figures)}"


STUDY = Study(
    results=Path(__file__).parent / "results",
    make=Run,
    protocol=PROTOCOL,
    execute="studies.lm.train:execute",
    said=_said,
    derived=("rate", "rank"),
    batched=True,
)


def load(folder: Path | None = None) -> Done:
    """Every run of this protocol, by key.

    Raises:
        ValueError: If a line cannot be read, or its key is not that of its configuration, or a run
            started from another base than the others.
    """
    done = STUDY.load(folder)
    if len({entry.result["base_sha256"] for entry in done.values()}) > 1:
        raise ValueError(f"the runs in {folder or STUDY.results} started from several base models")
    return done
