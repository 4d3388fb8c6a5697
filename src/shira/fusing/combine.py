# SPDX-License-Identifier: Apache-2.0
"""Several deltas of one weight made one: the weighted sum, and TIES' elected, disjoint mean.

Both work on the union of the supports; a position that a delta lacks is a zero of it. Sums are made
in float32 (float64 if a delta is) in the order given, each product rounded before it is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.delta import SparseDelta
from shira.support import align


def weighted_sum(deltas: Sequence[SparseDelta], weights: Sequence[float]) -> SparseDelta:
    """``sum_i weights[i] * deltas[i]`` on the union (task arithmetic, arXiv 2212.04089).

    Args:
        deltas: At least one, of one weight.
        weights: One for each.
    """
    union, places = align([delta.support for delta in deltas])
    wide = accumulation_dtype(*(delta.values.dtype for delta in deltas))
    total = torch.zeros(union.nnz, dtype=wide, device=union.indices.device)
    for delta, weight, place in zip(deltas, weights, places, strict=True):
        _add(total, place, delta.values.detach().to(wide) * weight)
    return SparseDelta(union, total)


def elected_mean(
    deltas: Sequence[SparseDelta], weights: Sequence[float], majority_sign_method: str = "total"
) -> SparseDelta:
    """At each position elect a sign, and average the weighted values that have it.

    TIES-Merging, arXiv 2306.01708, section 3, steps 2 and 3, in PEFT's form: the vote is among the
    values before they are weighted, a tie elects plus, and the sum of those that agree is divided
    by their number.

    Args:
        deltas: At least one, of one weight.
        weights: One for each.
        majority_sign_method: ``"total"`` elects the sign of the sum, ``"frequency"`` the sign that
            occurs more often.
    """
    union, places = align([delta.support for delta in deltas])
    wide = accumulation_dtype(*(delta.values.dtype for delta in deltas))
    total = torch.zeros(union.nnz, dtype=wide, device=union.indices.device)
    values = [delta.values.detach().to(wide) for delta in deltas]
    for value, place in zip(values, places, strict=True):
        _add(total, place, value.sign() if majority_sign_method == "frequency" else value)
    elected = torch.where(total >= 0, 1.0, -1.0).to(wide)  # (union.nnz,)
    total.zero_()
    agreeing = torch.zeros_like(total)
    for value, weight, place in zip(values, weights, places, strict=True):
        agrees = value.sign() == (elected if place is None else elected[place])
        _add(total, place, torch.where(agrees, value * weight, 0.0))
        _add(agreeing, place, agrees.to(wide))
    return SparseDelta(union, total / agreeing.clamp(min=1))


def _add(total: Tensor, place: Tensor | None, values: Tensor) -> None:
    """Add ``(k,)`` values at places that occur once each; None is everywhere."""
    if place is None:
        total += values
    else:
        total.index_add_(0, place, values)
