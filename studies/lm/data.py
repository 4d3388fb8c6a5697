# SPDX-License-Identifier: Apache-2.0
"""Targets as rows of token ids: what is trained on, what is validated on, what is tested on.

A text is a folder ``lm/NAME`` with ``train.txt`` and ``test.txt``, a set of questions a folder
``commonsense/NAME`` with ``train.jsonl`` and ``test.jsonl`` (``{"question": ..., "choices": [...],
"label": 0}`` a line). They are not part of this repository. What is validated on is drawn from the
training file, the same for every run, and never trained on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies.lm.protocol import CHOICES, SETS, Run

IGNORED = -100
BLOCK = 16  # windows of a text that are validated on, or trained on, together
VALIDATION_BLOCKS = 8
VALIDATION_ROWS = 200
PER_WINDOW = 2  # questions of a batch for each of its windows


@dataclass(frozen=True)
class Rows:
    """Rows to measure on.

    `ids` are the tokens of each, `scored` how many at its end are predicted, `of` says to which
    question a row belongs and `right` whether it is the right answer (None: a text).
    """

    ids: list[Tensor]
    scored: list[int]
    of: list[tuple[str, int]] | None = None
    right: list[bool] | None = None


def absent(data: Path | None, name: str) -> str | None:
    """Why a target (or the source) cannot be used from this folder; None where it can."""
    if data is None:
        return "no folder of data was named: --data FOLDER, or SHIRA_STUDY_DATA"
    files = [file for part in ("train", "test") for file in _files(data, name, part)]
    missing = [str(file.relative_to(data)) for file in files if not file.is_file()]
    return f"{data} has no {', '.join(missing)}" if missing else None


def measured(run: Run, data: Path, tokenizer: Any, name: str) -> Rows:
    """The rows that a run of the target or source `name` is measured on.

    Those of the test files are read for final runs alone.
    """
    final = run.stage == "final"
    if name == CHOICES:
        return _asked(data, tokenizer, final, run.window, (2 if final else 1) * run.rows)
    if final:
        ids = _encoded(data, name, "test", tokenizer)
        whole = ids[: len(ids) // run.window * run.window].view(-1, run.window)
        windows = _spread(whole, run.test)
    else:
        windows = _spread(_blocks(data, name, tokenizer, run.window)[1], run.validation)
    return Rows(list(windows), [run.window - 1] * len(windows))


def batches(
    run: Run, data: Path, tokenizer: Any, purpose: str, count: int
) -> list[dict[str, Tensor]]:
    """`count` batches of the target's training rows, on the CPU: the seed and purpose decide."""
    rng = random.Random(f"{purpose} {run.seed}")
    if run.target == CHOICES:
        pool = _trained_answers(data, tokenizer, run.window)
        drawn = [rng.sample(range(len(pool.ids)), PER_WINDOW * run.batch) for _ in range(count)]
        return [padded(pool, rows) for rows in drawn]
    blocks = _blocks(data, run.target, tokenizer, run.window)[0]
    return [_windows(blocks, run.window, run.batch, rng) for _ in range(count)]


def padded(rows: Rows, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Rows as a batch, as long as its longest: ids, and labels where a token is predicted."""
    longest = max(len(rows.ids[i]) for i in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
    labels = torch.full((len(chosen), longest), IGNORED)
    for at, i in enumerate(chosen):
        length = len(rows.ids[i])
        ids[at, :length] = rows.ids[i]
        labels[at, length - rows.scored[i] : length] = rows.ids[i][length - rows.scored[i] :]
    return {"input_ids": ids, "labels": labels}


def hashes(data: Path, name: str, part: str) -> str:
    """A hash of the files that a part was read from."""
    contents = b"".join(file.read_bytes() for file in _files(data, name, part))
    return hashlib.sha256(contents).hexdigest()[:16]


def _files(data: Path, name: str, part: str) -> list[Path]:
    if name == CHOICES:
        return [data / "commonsense" / each / f"{part}.jsonl" for each in SETS]
    return [data / "lm" / name / f"{part}.txt"]


def _windows(blocks: Tensor, window: int, rows: int, rng: random.Random) -> dict[str, Tensor]:
    count, length = blocks.shape
    places = [(rng.randrange(count), rng.randrange(length - window + 1)) for _ in range(rows)]
    ids = torch.stack([blocks[block, start : start + window] for block, start in places])
    return {"input_ids": ids, "labels": ids}


@functools.lru_cache
def _blocks(data: Path, name: str, tokenizer: Any, window: int) -> tuple[Tensor, Tensor]:
    """Blocks to train on, and the windows to validate on."""
    ids = _encoded(data, name, "train", tokenizer)
    length = window * BLOCK
    blocks = ids[: len(ids) // length * length].view(-1, length)
    if len(blocks) <= VALIDATION_BLOCKS:
        raise ValueError(f"lm/{name}/train.txt gives {len(blocks)} blocks: none to train on")
    drawn = random.Random(f"validation {name}").sample(range(len(blocks)), VALIDATION_BLOCKS)
    kept = [i for i in range(len(blocks)) if i not in drawn]
    return blocks[kept], blocks[sorted(drawn)].view(-1, window)


@functools.lru_cache
def _encoded(data: Path, name: str, part: str, tokenizer: Any) -> Tensor:
    (file,) = _files(data, name, part)
    return torch.tensor(tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"])


def _spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` windows at even distances."""
    count = min(count, len(windows))
    return windows[[i * len(windows) // count for i in range(count)]]


@functools.lru_cache
def _shuffled(data: Path, part: str) -> dict[str, list[dict[str, Any]]]:
    """The questions of each set, in an order that is the same for every run."""
    found = {}
    for name, file in zip(SETS, _files(data, CHOICES, part), strict=True):
        lines = file.read_text(encoding="utf-8").split("\n")
        found[name] = [json.loads(line) for line in lines if line]
        random.Random(f"{part} {name}").shuffle(found[name])
    return found


@functools.lru_cache
def _asked(data: Path, tokenizer: Any, final: bool, window: int, count: int) -> Rows:
    """Every answer to so many questions of each set."""
    sets = _shuffled(data, "test" if final else "train")
    asked = [(name, each) for name, rows in sets.items() for each in rows[:count]]
    return _answers(asked, tokenizer, window)


@functools.lru_cache
def _trained_answers(data: Path, tokenizer: Any, window: int) -> Rows:
    """The right answers of all questions that are not validated on, equally many of each set."""
    sets = _shuffled(data, "train")
    held_out = {name: min(VALIDATION_ROWS, len(rows) // 2) for name, rows in sets.items()}
    count = min(len(rows) - held_out[name] for name, rows in sets.items())
    chosen = [
        (name, each)
        for name, rows in sets.items()
        for each in rows[held_out[name] : held_out[name] + count]
    ]
    every = _answers(chosen, tokenizer, window)
    assert every.right is not None
    right = [i for i, is_right in enumerate(every.right) if is_right]
    return Rows([every.ids[i] for i in right], [every.scored[i] for i in right])


def _answers(questions: list[tuple[str, dict[str, Any]]], tokenizer: Any, window: int) -> Rows:
    """A row for each choice of each question; of long questions the end is kept."""
    ids, scored, of, right = [], [], [], []
    for number, (name, question) in enumerate(questions):
        asked = tokenizer(f"Question: {question['question']}\nAnswer:")["input_ids"]
        for i, choice in enumerate(question["choices"]):
            answer = tokenizer(f" {choice}")["input_ids"][: window - 1]
            ids.append(torch.tensor([*asked, *answer][-window:]))
            scored.append(len(answer))
            of.append((name, number))
            right.append(i == question["label"])
    return Rows(ids, scored, of, right)
