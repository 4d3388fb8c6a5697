# SPDX-License-Identifier: Apache-2.0
"""Rows of a task: training, validation and test, as states of the frozen blocks.

A task is a folder with ``train.jsonl`` and ``test.jsonl`` (one ``{"text": ..., "label": int}`` a
line) and ``labels.json`` (the names by index). The rows are not part of this repository.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from studies.accuracy import model
from studies.accuracy.protocol import Run

FILES = ("labels.json", "train.jsonl", "test.jsonl")


@dataclass(frozen=True)
class Split:
    """States (tokens, width) and labels, row by row, and a hash of the file they came from."""

    states: list[Tensor]
    labels: list[int]
    sha256: str


def absent(data: Path | None, task: str) -> str | None:
    """Why a task cannot be run from this folder; None where it can."""
    if data is None:
        return "no folder of data was named: --data FOLDER, or SHIRA_STUDY_DATA"
    missing = [name for name in FILES if not (data / task / name).is_file()]
    return f"{data / task} has no {', '.join(missing)}" if missing else None


@functools.lru_cache
def label_names(data: Path, task: str) -> tuple[str, ...]:
    """The names of a task's labels."""
    return tuple(json.loads((data / task / "labels.json").read_text(encoding="utf-8")))


@functools.lru_cache
def splits(
    data: Path,
    task: str,
    *,
    training_rows: int,
    validation_rows: int,
    max_tokens: int,
    frozen_blocks: int,
) -> tuple[Split, Split]:
    """Training and validation rows: draws from ``train.jsonl`` that are the same for every run."""
    rows, digest = _rows(data / task / "train.jsonl")
    order = random.Random(f"validation {task}").sample(range(len(rows)), len(rows))
    held_out = [rows[i] for i in order[:validation_rows]]
    kept = [rows[i] for i in order[validation_rows:][:training_rows]]
    training = _split(kept, max_tokens, frozen_blocks, digest)
    return training, _split(held_out, max_tokens, frozen_blocks, digest)


@functools.lru_cache
def test_split(
    data: Path, task: str, *, test_rows: int, max_tokens: int, frozen_blocks: int
) -> Split:
    """Rows of ``test.jsonl``: all, or a draw of `test_rows` that is the same for every run."""
    rows, digest = _rows(data / task / "test.jsonl")
    if len(rows) > test_rows:
        rows = random.Random(f"test {task}").sample(rows, test_rows)
    return _split(rows, max_tokens, frozen_blocks, digest)


def splits_of(run: Run, data: Path) -> tuple[Split, Split]:
    """Training and validation rows of a run."""
    return splits(
        data,
        run.task,
        training_rows=run.training_rows,
        validation_rows=run.validation_rows,
        max_tokens=run.max_tokens,
        frozen_blocks=run.frozen_blocks,
    )


def test_split_of(run: Run, data: Path) -> Split:
    """Test rows of a run."""
    return test_split(
        data,
        run.task,
        test_rows=run.test_rows,
        max_tokens=run.max_tokens,
        frozen_blocks=run.frozen_blocks,
    )


@functools.lru_cache
def tokenizer() -> Any:
    """The base model's tokenizer."""
    from transformers import AutoTokenizer

    from shira.cli.demo.classification import model_path

    return AutoTokenizer.from_pretrained(model_path())


def _rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    content = path.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").split("\n") if line]
    return rows, hashlib.sha256(content).hexdigest()


def _split(rows: list[dict[str, Any]], max_tokens: int, frozen_blocks: int, digest: str) -> Split:
    texts = [row["text"] for row in rows]
    ids = tokenizer()(texts, truncation=True, max_length=max_tokens)["input_ids"]
    states = model.states(ids, frozen_blocks, tokenizer().pad_token_id)
    return Split(states, [row["label"] for row in rows], digest)
