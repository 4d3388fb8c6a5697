# SPDX-License-Identifier: Apache-2.0
"""Encoding texts and predicting with a sequence classifier, alike in both demo processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shira.cli.progress import track

Encoded = Mapping[str, Any]
_BATCH = 64


def encode(tokenizer: Any, texts: Sequence[str], *, max_length: int) -> list[list[int]]:
    """Token ids of each text, cut to `max_length`."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)[
        "input_ids"
    ]
    return ids


def pad(ids: Sequence[Sequence[int]], *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch as wide as its longest text: int64 `input_ids` and `attention_mask`, (B, length)."""
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
    }


@torch.no_grad()
def predict_logits(
    model: nn.Module, ids: Sequence[Sequence[int]], *, pad_token_id: int, what: str = "predicting"
) -> Tensor:
    """Logits of each text, float32 (texts, labels), with the model in evaluation mode.

    Batches hold texts of similar length; which ones depends on the lengths alone, so that two
    processes compute the same thing.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    rows: list[tuple[int, Tensor]] = []
    for start in track(range(0, len(order), _BATCH), what):
        chosen = order[start : start + _BATCH]
        batch = pad([ids[i] for i in chosen], pad_token_id=pad_token_id)
        rows += zip(chosen, model(**batch).logits.float(), strict=True)
    model.train(was_training)
    return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def accuracy(logits: Tensor, labels: Sequence[int]) -> float:
    """The share of texts whose largest logit is that of their label."""
    return float((logits.argmax(dim=1) == torch.tensor(labels)).float().mean())
