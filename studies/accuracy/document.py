# SPDX-License-Identifier: Apache-2.0
"""Puts the tables and the figure into docs/study.md, between its markers."""

from __future__ import annotations

from pathlib import Path

from studies.accuracy import figures, tables
from studies.accuracy.plan import plan
from studies.accuracy.runs import STUDY
from studies.page import DOCS, fill

FIGURE = "study-tuning.svg"


def rebuild(docs: Path = DOCS, results: Path = STUDY.results) -> list[str]:
    """Write tables and figure from the runs in `results`.

    Returns:
        What to say: what is missing, and what was written.

    Raises:
        ValueError: If the page has lost its markers, or a run cannot be read.
    """
    done = STUDY.load(results)
    left = plan(done)
    said = f"All {len(done)} runs made."
    if left.missing:
        said = (
            f"{len(done)} runs made, at least {left.missing} missing: {len(left.tuning)} of tuning "
            f"and {len(left.final) + left.unknown_finals} final ones."
        )
    page = docs / "study.md"
    drawn = figures.tuning(done, docs / FIGURE)
    parts = [
        said,
        "### Runs",
        tables.progress(done),
        "### Test figures, in percent",
        tables.finals(done),
        "### Paired with LoRA of the same task and seed, in points",
        tables.paired(done),
        "### Learning rates chosen",
        "Beside each the mean validation figure over the tuning tasks, in percent, and that of the "
        "rates around it.",
        tables.rates(done),
        *([f"![Validation figure over learning rate]({FIGURE})"] if drawn else []),
    ]
    fill(page, parts)
    return [said, f"written: {page.name}" + (f", {FIGURE}" if drawn else "")]
