# SPDX-License-Identifier: Apache-2.0
"""The k entries of highest score, for scores that are never held all at once.

Shared by the masks that look at values. A weight is gone through once, in blocks of its rows;
what is kept between blocks are the best k entries so far. Memory is O(k + one block).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.errors import MaskError

BLOCK = 2**22
"""Entries in a block: 16 MiB of float32 scores."""


def top_k(blocks: Iterable[Tensor], k: int) -> Tensor:
    """Flat indices of the k highest scores; of equal scores the first.

    The answer depends on the scores alone, not on the device or on how they are cut into blocks.

    Args:
        blocks: The scores in order of their flat index, cut into 1-D float32 or float64 tensors of
            any lengths, of at least k entries together, on one device.
        k: How many, at least 1.

    Returns:
        int64 ``(k,)``, increasing, on the scores' device.

    Raises:
        MaskError: If a score is NaN, or there are fewer than k.
    """
    # The best so far, in order of their index. Selecting among them is numpy's: on large k it is
    # several times as fast as torch, and only what beats the limit comes over from a GPU.
    best, where = np.empty(0, np.float32), np.empty(0, np.int64)
    limit: float | None = None  # the lowest of k scores; an equal one that comes now is too late
    start, device = 0, torch.device("cpu")
    for scores in blocks:
        numel, device = scores.numel(), scores.device
        _refuse_nan(scores, start)
        if limit is None:
            found = torch.arange(numel, device=device)
        else:
            found = (scores > limit).nonzero().squeeze(1)
            scores = scores[found]
        best = np.concatenate((best, scores.cpu().numpy()))
        where = np.concatenate((where, found.cpu().numpy() + start))
        start += numel
        if best.size >= k:
            limit = float(np.partition(best, best.size - k)[best.size - k])
            kept = _first_of_highest(best, k, limit)
            best, where = best[kept], where[kept]
    if where.size < k:
        raise MaskError(f"{k} entries cannot be chosen among {start}")
    return torch.from_numpy(where).to(device)


def row_blocks(tensor: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """A tensor in flat pieces of at most ``size`` entries, in logical row-major order.

    A copy is made only of a piece that is not contiguous, and only while it is looked at.
    """
    if tensor.numel() <= size:
        yield tensor.reshape(-1)
        return
    rows = size // tensor[0].numel()
    if rows:
        for low in range(0, len(tensor), rows):
            yield tensor[low : low + rows].reshape(-1)
    else:  # not even one row fits
        for row in tensor:
            yield from row_blocks(row, size)


def check_scored(tensor: Tensor, what: str) -> Tensor:
    """A weight or gradient to score, detached, after making sure that it has values to look at.

    Raises:
        MaskError: If it is not a floating point tensor, or is on the meta device.
    """
    if not isinstance(tensor, Tensor):
        raise MaskError(f"the {what} is a tensor, not {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise MaskError(f"the {what} holds floating point numbers, not {tensor.dtype}")
    if tensor.is_meta:
        raise MaskError(
            f"the {what} is on the meta device and has no values to choose by; load it first, or "
            "choose by position: mask_type 'random' or 'struct'"
        )
    return tensor.detach()


def _first_of_highest(
    scores: NDArray[np.floating], k: int, limit: float
) -> NDArray[np.signedinteger]:
    """Positions, increasing, of the k highest scores, of equal ones the first.

    ``limit`` is the k-th highest score.
    """
    chosen = scores > limit
    level = np.flatnonzero(scores == limit)
    chosen[level[: k - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen)


def _refuse_nan(scores: Tensor, start: int) -> None:
    if scores.numel() and bool(scores.max().isnan()):  # a maximum hands NaN on
        at = start + int(scores.isnan().nonzero()[0])
        raise MaskError(
            f"the score of flat entry {at} is not a number (NaN), so there is no order; "
            "look for NaN or infinity in the weight or its gradient"
        )
