# SPDX-License-Identifier: Apache-2.0
"""Making one delta sparser before it is combined: TIES' trim, DARE's drop, DELLA's MagPrune.

Each takes a delta and gives one on fewer of its entries. ``density`` is the share of the delta's
own entries that stay (PEFT's and mergekit's word): what a mask has left out is not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.delta import SparseDelta
from shira.masks.topk import top_k
from shira.support import Support, matrix_shape


def trim(delta: SparseDelta, density: float) -> SparseDelta:
    """Keep the ``int(density * k)`` entries of largest magnitude; of equal ones the first.

    TIES-Merging, arXiv 2306.01708, section 3, step 1; PEFT's ``magnitude_based_pruning``.
    """
    count = int(density * delta.nnz)
    if count >= delta.nnz:
        return delta
    if not count:
        return _only(delta, torch.zeros(0, dtype=torch.int64, device=delta.values.device))
    return _only(delta, top_k([magnitude(delta)], count))


def drop(delta: SparseDelta, density: float, draw: Tensor) -> SparseDelta:
    """Keep each entry with probability ``density`` and divide it by that: the mean stays.

    DARE, arXiv 2311.03099, section 3: drop and rescale.

    Args:
        delta: What to thin out.
        density: Probability of an entry to stay, in (0, 1].
        draw: float64 ``(k,)`` uniform in [0, 1), on the CPU.
    """
    return _sample(delta, torch.full_like(draw, density), draw)


def mag_prune(delta: SparseDelta, density: float, epsilon: float, draw: Tensor) -> SparseDelta:
    """As `drop`, but large entries stay more often than small ones.

    DELLA, arXiv 2406.11617, section 3.1 (MagPrune): within a row, the probability to stay goes
    from ``density - epsilon / 2`` for the smallest to ``density + epsilon / 2`` for the largest;
    what stays is divided by its own probability.

    Args:
        delta: What to thin out.
        density: Mean probability of an entry to stay.
        epsilon: Width of the range of probabilities; 0 makes it DARE.
        draw: float64 ``(k,)`` uniform in [0, 1), on the CPU.
    """
    rank = row_rank(delta).cpu()  # (k,) from 0 to 1
    return _sample(delta, (density - epsilon / 2) + epsilon * rank, draw)


def row_rank(delta: SparseDelta) -> Tensor:
    """Where each entry stands by magnitude among those of its row, as the weight is stored.

    Returns:
        float64 ``(k,)``: 0 for the smallest of a row, 1 for the largest, 0.5 if it is the only one.
    """
    rows, cols = matrix_shape(delta.support.shape)
    row = delta.support.indices.long() // max(cols, 1)  # (k,) sorted
    order = torch.argsort(magnitude(delta), stable=True)
    order = order[torch.argsort(row[order], stable=True)]  # by row, in it by magnitude
    count = torch.bincount(row, minlength=rows)
    start = count.cumsum(0) - count
    rank = torch.empty(delta.nnz, dtype=torch.float64, device=row.device)
    within = torch.arange(delta.nnz, device=row.device) - start[row]
    rank[order] = within.double()
    last = (count[row] - 1).double()
    return torch.where(last > 0, rank / last.clamp(min=1), 0.5)


def magnitude(delta: SparseDelta) -> Tensor:
    """The values' magnitudes ``(k,)`` in float32, or float64 if the values are."""
    return delta.values.detach().to(accumulation_dtype(delta.values.dtype)).abs()


def _sample(delta: SparseDelta, chance: Tensor, draw: Tensor) -> SparseDelta:
    kept = (draw < chance).nonzero().squeeze(1)
    stays = _only(delta, kept.to(delta.values.device))
    wide = stays.values.to(accumulation_dtype(delta.values.dtype))
    return SparseDelta(stays.support, wide / chance[kept].to(wide))


def _only(delta: SparseDelta, entries: Tensor) -> SparseDelta:
    """The delta on some of its entries, int64 in increasing order."""
    support = Support._trusted(delta.support.shape, delta.support.indices[entries])
    return SparseDelta(support, delta.values[entries])
