# SPDX-License-Identifier: Apache-2.0
"""Fusing on dense tensors of the weight's shape: slow, and what the tests go by.

Each deterministic method of `METHODS` in a few lines of plain torch, with a zero wherever a delta
has no entry. For the random ones it is enough to have what they make of each delta: their
combinations are those below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shira.delta import SparseDelta


def dense(delta: SparseDelta) -> Tensor:
    """The delta as a dense tensor of the weight's shape."""
    made = torch.zeros(delta.support.numel, dtype=delta.values.dtype)
    made[delta.support.indices.long()] = delta.values
    return made.view(delta.support.shape)


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i weights[i] * deltas[i]``."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + delta * weight
    return total


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float], vote: str = "total") -> Tensor:
    """The mean, at each position, of the weighted values that have the elected sign."""
    result = torch.zeros_like(deltas[0]).reshape(-1)
    for at, values in enumerate(torch.stack([delta.reshape(-1) for delta in deltas], 1)):
        ballots = values.sign() if vote == "frequency" else values
        total = torch.zeros((), dtype=values.dtype)
        for ballot in ballots:
            total = total + ballot
        elected = 1 if total >= 0 else -1
        agreeing = [v * w for v, w in zip(values, weights, strict=True) if v.sign() == elected]
        if agreeing:
            result[at] = sum(agreeing[1:], agreeing[0]) / len(agreeing)
    return result.view(deltas[0].shape)


def trim(delta: Tensor, count: int) -> Tensor:
    """The ``count`` entries of largest magnitude; of equal ones the first."""
    flat = delta.reshape(-1)
    kept = sorted(range(flat.numel()), key=lambda i: (-abs(float(flat[i])), i))[:count]
    result = torch.zeros_like(flat)
    result[kept] = flat[kept]
    return result.view(delta.shape)
