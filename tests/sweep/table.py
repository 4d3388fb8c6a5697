# SPDX-License-Identifier: Apache-2.0
"""The table of results: one line a class in ``results.csv``, and the page made of it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("results.csv")
PAGE = Path(__file__).parents[2] / "docs" / "sweep.md"
COLUMNS = ("library", "class", "verdict", "layers", "detail")
VERDICTS = ("right", "refused", "not built", "not run", "WRONG")
LONGEST = 160


def rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of results, the last of each class."""
    if not file.exists():
        return []
    found = map(json.loads, file.read_text().splitlines())
    return list({row["class"]: row for row in found}.values())


def write(files: Iterable[Path], names: Callable[[str], list[str]]) -> None:
    """Write the table and the page from files of results; other libraries stay as they are.

    Args:
        files: Results, one file a library.
        names: Gives all classes of a library; those without a result are *not run*.
    """
    new = []
    for file in files:
        found = {row["class"]: row for row in rows(file)}
        label = next(iter(found.values()))["library"]
        blank = {"library": label, "verdict": "not run", "layers": 0, "detail": ""}
        new += [found.get(name, blank | {"class": name}) for name in names(file.stem)]
    libraries = {row["library"].split()[0] for row in new}
    old = [row for row in read() if row["library"].split()[0] not in libraries]
    every = sorted(old + new, key=lambda row: (row["library"], row["class"]))
    with TABLE.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"detail": _short(row["detail"])} for row in every)
    PAGE.write_text(page(read()))


def read() -> list[dict[str, str]]:
    """Return the rows of the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as stream:
        return list(csv.DictReader(stream))


def page(table: list[dict[str, str]]) -> str:
    """Return the page of the docs."""
    counts = Counter((row["library"], row["verdict"]) for row in table)
    libraries = sorted({row["library"] for row in table})
    lines = [HEAD, "| library | " + " | ".join(VERDICTS) + " |", "|---|" + "---|" * len(VERDICTS)]
    for library in libraries:
        numbers = [str(counts[library, verdict]) for verdict in VERDICTS]
        lines.append(f"| {library} | " + " | ".join(numbers) + " |")
    for library in libraries:
        lines += ["", f"## {library}", "", "| class | verdict | layers | what is to say |"]
        lines.append("|---|---|---|---|")
        for row in table:
            if row["library"] == library:
                detail = row["detail"].replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
                lines.append(f"| {row['class']} | {row['verdict']} | {row['layers']} | {detail} |")
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


HEAD = """# Models that were tried

Every model class that transformers' tables of automatic classes name, every public model class of
diffusers, and one architecture of each module of timm, with small sizes and random weights. An
adapter was put on all linear layers (`target_modules="all-linear"`) and, once for each kind of
model, on all embeddings and two-dimensional convolutions. What it computes was compared with a
copy of the model into whose weights the same deltas had been added.

- *right*: an untrained adapter changes no bit of the output; a filled one gives the output of the
  merged copy in evaluation with and without gradients, in training without dropout, and merged;
  its gradient is that of the merged copy; unmerging and unloading give the base back bit for bit.
- *refused*: a `ShiraError` says why when the adapter is made, and the model is as it was.
- *not run*: a run over all of them takes a quarter of an hour of two idle cores; this class has not
  had its turn.
- *not built*: no small model of the class could be made or fed here. It says nothing of the
  library.

Layers "without gradient, in the base neither" took no part in the outputs for this input: experts
without tokens, a vision tower without a picture. "Rounding" is the largest difference as a share of
the largest output, where the order of a sum was another one; more than 2e-5 counts as wrong.

The table is made by `python -m tests.sweep --library transformers` (`diffusers`, `timm`), which
goes on where it was stopped, and `python -m tests.sweep --write`.
"""
