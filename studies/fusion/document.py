# SPDX-License-Identifier: Apache-2.0
"""Puts the tables into docs/study-fusion.md, between its markers."""

from __future__ import annotations

from pathlib import Path

from studies.fusion import runs, tables
from studies.fusion.protocol import FAMILIES, SEEDS
from studies.page import DOCS, fill

PAGE = "study-fusion.md"


def rebuild(docs: Path = DOCS, results: Path = runs.STUDY.results) -> list[str]:
    """Write the tables from the runs in `results`; returns what to say.

    Raises:
        ValueError: If the page has lost its markers, or a run cannot be read.
    """
    done = runs.STUDY.load(results)
    missing = len(FAMILIES) * len(SEEDS) - len(done)
    said = (
        f"{len(done)} runs made, {missing} missing." if missing else f"All {len(done)} runs made."
    )
    fill(
        docs / PAGE,
        [
            said,
            "### Overlap, and what fusing loses",
            tables.overlaps(done),
            "### Before fusing, in percent",
            tables.alone(done),
            "### Mean accuracy of the three tasks after fusing, in percent",
            tables.kept(done),
            "### Lost by fusing, in points",
            tables.losses(done),
        ],
    )
    return [said, f"written: {PAGE}"]
