# SPDX-License-Identifier: Apache-2.0
"""Puts the tables and the figure into docs/study-language.md, between its markers."""

from __future__ import annotations

from pathlib import Path

from studies.language import figures, store, tables
from studies.language.plan import plan
from studies.page import DOCS, fill

PAGE = "study-language.md"
FIGURE = "study-language-trade.svg"


def rebuild(docs: Path = DOCS, results: Path = store.RESULTS) -> list[str]:
    """Write tables and figure from the runs in `results`.

    Returns:
        What to say: what is missing, and what was written.

    Raises:
        ValueError: If the page has lost its markers, or a run cannot be read.
    """
    done = store.load(results)
    left = plan(done)
    said = f"All {len(done)} runs made."
    if left.missing:
        said = (
            f"{len(done)} runs made, at least {left.missing} missing: "
            f"{len(left.tuning)} of tuning, {len(left.final) + left.unknown_finals} final ones and "
            f"{len(left.frontier)} of the frontier."
        )
    page = docs / PAGE
    drawn = figures.trade(done, docs / FIGURE)
    parts = [
        said,
        "### The base",
        tables.base(store.load_base(results)),
        "### Runs",
        tables.progress(done),
        "### Perplexity of the target, test",
        tables.perplexities(done, "target"),
        "### Perplexity of the source after it, test",
        tables.perplexities(done, "source"),
        "### Paired with LoRA of the same target and seed, in nats a token",
        tables.paired(done),
        "### Perplexity of the source at equal gain, validation",
        tables.frontier(done),
        *([f"![Perplexity of the source over that of the target]({FIGURE})"] if drawn else []),
        "### Learning rates chosen",
        "`*`: the lowest or highest rate that was tried.",
        tables.rates(done),
    ]
    fill(page, parts)
    return [said, f"written: {page.name}" + (f", {FIGURE}" if drawn else "")]
