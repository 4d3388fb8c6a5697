# SPDX-License-Identifier: Apache-2.0
"""Results as JSON files and as tables: rich on a terminal, plain ASCII or Markdown elsewhere.

``python -m benchmarks.report`` draws all results that are there, as a page (`benchmarks.page`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Table:
    """Rows of text under a title; the first column is left-aligned, the others right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print(self) -> None:
        if sys.stdout.isatty() and self._print_rich():
            return
        print(self.plain())

    def plain(self) -> str:
        grid = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            )
            for row in grid
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, lines[0], rule, *lines[1:], *self.notes, ""])

    def markdown(self) -> str:
        """The rows as a Markdown table, the notes below it; the title is the caller's."""
        lines = [self.columns, ["---"] + ["--:"] * (len(self.columns) - 1), *self.rows]
        table = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        return "\n\n".join([table, *self.notes]) + "\n"

    def _print_rich(self) -> bool:
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            return False
        table = RichTable(
            title=self.title, title_justify="left", caption="\n".join(self.notes) or None
        )
        table.caption_justify = "left"
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        Console().print(table)
        return True


def document(
    suite: str, settings: dict[str, Any], environment: dict[str, Any], body: dict[str, Any]
) -> dict[str, Any]:
    """The JSON document of one suite. ``body`` holds ``answers`` and ``results``."""
    return {
        "suite": suite,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": environment,
        "settings": settings,
        **body,
    }


def write(result: dict[str, Any], output: Path) -> None:
    """Write one document. Refuses ``nan`` and infinities: any JSON reader can read it."""
    text = json.dumps(_rounded(result), indent=2, allow_nan=False) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of these measurements has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def busy_note(result: dict[str, Any]) -> list[str]:
    """A warning below the table when other processes had more than a twentieth of the machine."""
    share = result["environment"].get("cpu_share_of_others")
    if share is None or share <= 0.05:
        return []
    return [f"Other processes took {100 * share:.0f} % of the machine meanwhile: run it again."]


def say(text: str) -> None:
    """Progress, on standard error: one line that is rewritten on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from benchmarks.page import main

    sys.exit(main())
