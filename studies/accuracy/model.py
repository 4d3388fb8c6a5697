# SPDX-License-Identifier: Apache-2.0
"""The base in two parts: frozen blocks, whose output is computed once, and what methods adapt.

A frozen block gives the same states for a row in every step of every run. `states` computes them
once; `Classifier` is the rest of the encoder, with a head on the mean of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 64


@dataclass(frozen=True)
class Output:
    """Logits (B, labels), and the mean cross-entropy where labels were given."""

    logits: Tensor
    loss: Tensor | None


class Classifier(nn.Module):
    """The blocks above the frozen ones, and a new head that `seed` alone decides.

    The head reads the mean over the row's tokens, scaled to the length of the square root of its
    width, as the base was made to be read. No dropout.
    """

    def __init__(self, labels: int, *, frozen_blocks: int, seed: int) -> None:
        super().__init__()
        self.encoder = _load().encoder
        self.encoder.layer = self.encoder.layer[frozen_blocks:]
        torch.manual_seed(seed)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, labels)

    def forward(self, states: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        """`states` (B, T, width) of the frozen blocks; `attention_mask` and `labels` int64."""
        seen = attention_mask.bool()[:, None, None, :]
        last = self.encoder(states, attention_mask=seen).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(last.dtype)
        pooled = nn.functional.normalize((last * kept).sum(dim=1), dim=1) * last.shape[-1] ** 0.5
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(logits, loss)


def states(ids: Sequence[Sequence[int]], frozen_blocks: int, pad_token_id: int) -> list[Tensor]:
    """What the frozen blocks give for each row of token ids: float32 (tokens, width)."""
    lower = _load()
    lower.encoder.layer = lower.encoder.layer[:frozen_blocks]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            padded, mask = pad([torch.tensor(ids[i]) for i in chosen], pad_token_id)
            given = lower(input_ids=padded, attention_mask=mask).last_hidden_state
            found |= {i: row[: len(ids[i])].clone() for i, row in zip(chosen, given, strict=True)}
    return [found[i] for i in range(len(ids))]


def pad(rows: Sequence[Tensor], value: float = 0) -> tuple[Tensor, Tensor]:
    """Rows as a batch as wide as the longest of them, and its mask: int64 (B, T)."""
    ones = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    stacked = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    return stacked, nn.utils.rnn.pad_sequence(ones, batch_first=True)


def batch(rows: Sequence[Tensor], labels: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Rows of states as a batch."""
    states, mask = pad(rows)
    made = {"states": states, "attention_mask": mask}
    return made if labels is None else {**made, "labels": torch.tensor(labels)}


@torch.no_grad()
def predict(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Logits of each row, (rows, labels), with the model in evaluation mode."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [
        model(**batch([rows[i] for i in order[start : start + _BATCH]])).logits
        for start in range(0, len(order), _BATCH)
    ]
    model.train(was_training)
    logits = torch.cat(parts)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def _load() -> Any:
    """The base in evaluation mode, without pooler and dropout."""
    from transformers import AutoModel

    from shira.cli.demo.classification import model_path

    return AutoModel.from_pretrained(
        model_path(),
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).eval()
