# SPDX-License-Identifier: Apache-2.0
"""Texts as token ids: blocks to train on, windows to validate and to test on.

A text is a folder ``lm/NAME`` with ``train.txt`` and ``test.txt``. The texts are not part of this
repository. ``train.txt`` is cut into blocks of some windows; some blocks, drawn once, are the
validation windows, and the others are trained on.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES = ("train.txt", "test.txt")


@dataclass(frozen=True)
class Training:
    """Token ids, int64, to train on and to validate on, and the hash of the file.

    `blocks` is (blocks, tokens of a block), `validation` (windows, tokens of a window).
    """

    blocks: Tensor
    validation: Tensor
    sha256: str


def absent(data: Path | None, name: str) -> str | None:
    """Why a text cannot be used from this folder; None where it can."""
    if data is None:
        return "no folder of data was named: --data FOLDER, or SHIRA_STUDY_DATA"
    missing = [file for file in FILES if not (data / "lm" / name / file).is_file()]
    return f"{data / 'lm' / name} has no {', '.join(missing)}" if missing else None


def read(data: Path, name: str, file: str) -> tuple[str, str]:
    """A file's text, and its hash."""
    content = (data / "lm" / name / file).read_bytes()
    return content.decode("utf-8"), hashlib.sha256(content).hexdigest()


@functools.lru_cache
def training(
    data: Path, name: str, tokenizer: Path, *, window: int, block_windows: int, validation: int
) -> Training:
    """The training text. Which blocks are validation depends on the name and the length alone.

    Args:
        data: the folder of data.
        name: of the text.
        tokenizer: its file.
        window: tokens of a window.
        block_windows: windows of a block; what is left over at the end is not used.
        validation: how many windows to validate on, spread evenly over the blocks drawn for it.

    Raises:
        ValueError: If the text is too short for it.
    """
    text, digest = read(data, name, "train.txt")
    ids = _encode(tokenizer, text)
    length = window * block_windows
    blocks = ids[: len(ids) // length * length].view(-1, length)
    held_out = -(-validation // block_windows)
    if len(blocks) <= held_out:
        raise ValueError(
            f"lm/{name}/train.txt gives {len(blocks)} blocks of {length} tokens: {held_out} of "
            "them are for validation, and none would be left to train on"
        )
    chosen = sorted(random.Random(f"validation {name}").sample(range(len(blocks)), held_out))
    kept = [i for i in range(len(blocks)) if i not in set(chosen)]
    return Training(blocks[kept], spread(blocks[chosen].view(-1, window), validation), digest)


@functools.lru_cache
def test_windows(
    data: Path, name: str, tokenizer: Path, *, window: int, count: int
) -> tuple[Tensor, str]:
    """At most `count` windows of the test text, spread evenly over it, and the file's hash."""
    text, digest = read(data, name, "test.txt")
    ids = _encode(tokenizer, text)
    return spread(ids[: len(ids) // window * window].view(-1, window), count), digest


def draw(blocks: Tensor, window: int, rows: int, rng: random.Random) -> Tensor:
    """`rows` windows, each anywhere within any block: int64 (rows, window)."""
    count, length = blocks.shape
    places = [(rng.randrange(count), rng.randrange(length - window + 1)) for _ in range(rows)]
    return torch.stack([blocks[block, start : start + window] for block, start in places])


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` windows at even distances."""
    count = min(count, len(windows))
    return windows[[i * len(windows) // count for i in range(count)]].contiguous()


def _encode(tokenizer: Path, text: str) -> Tensor:
    return torch.tensor(_tokenizer(tokenizer).encode(text).ids)


@functools.lru_cache
def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
