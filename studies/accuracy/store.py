# SPDX-License-Identifier: Apache-2.0
"""results/*.jsonl: this study's runs, kept by `studies.store`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import store as common
from studies.accuracy.protocol import PROTOCOL, Run

RESULTS = Path(__file__).parent / "results"

Done = common.Done[Run]


def load(folder: Path = RESULTS) -> dict[str, Done]:
    """Every run of this protocol, by key. A last line that was cut off is passed over.

    Raises:
        ValueError: If a line cannot be read, or its key is not that of its configuration.
    """
    return common.load(folder, Run, PROTOCOL)


def append(
    run: Run, result: Mapping[str, Any], about: Mapping[str, Any], folder: Path = RESULTS
) -> None:
    """Write a finished run at the end of its stage's file, whole or not at all."""
    common.append(run, result, about, folder, rate=run.rate, rank=run.rank)
