# SPDX-License-Identifier: Apache-2.0
"""results/*.jsonl: the making of the base and this study's runs, kept by `studies.store`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import store as common
from studies.language.protocol import BASE, PROTOCOL, Base, Run

RESULTS = Path(__file__).parent / "results"

Done = common.Done[Run]


def load(folder: Path = RESULTS) -> dict[str, Done]:
    """Every run of this protocol, by key. A last line that was cut off is passed over.

    Raises:
        ValueError: If a line cannot be read, its key is not that of its configuration, or it
            started from another base model than the one that is recorded.
    """
    every = common.load(folder, _make, PROTOCOL)
    made = every.get(BASE.key)
    runs = {key: done for key, done in every.items() if isinstance(done.run, Run)}
    for key, done in runs.items():
        if made is None or done.result["base_sha256"] != made.result["model_sha256"]:
            raise ValueError(f"run {key} started from a base model that base.jsonl does not record")
    return runs


def load_base(folder: Path = RESULTS) -> Mapping[str, Any] | None:
    """What came of making the base that the runs start from; None where it was not made."""
    made = common.load(folder, _make, PROTOCOL).get(BASE.key)
    return None if made is None else made.result


def append(
    run: Run, result: Mapping[str, Any], about: Mapping[str, Any], folder: Path = RESULTS
) -> None:
    """Write a finished run at the end of its stage's file, whole or not at all."""
    common.append(run, result, about, folder, rate=run.rate)


def append_base(
    result: Mapping[str, Any], about: Mapping[str, Any], folder: Path = RESULTS
) -> None:
    """Record the making of the base."""
    common.append(BASE, result, about, folder)


def _make(**fields: Any) -> Base | Run:
    return Base(**fields) if fields.get("stage") == "base" else Run(**fields)
