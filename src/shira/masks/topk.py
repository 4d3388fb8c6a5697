# SPDX-License-Identifier: Apache-2.0
"""The k entries of highest score, for scores that are never held all at once.

Shared by the masks that look at values. A weight is gone through once, in blocks of its rows;
what is kept between blocks are the best k entries so far. Memory is O(k + one block).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.errors import MaskError

BLOCK = 2**22
"""Entries in a block: 16 MiB of float32 scores."""


def top_k(blocks: Iterable[Tensor], k: int) -> Tensor:
    """Return flat indices, int64 ``(k,)`` increasing, of the k highest scores; k is at least 1.

    Of equal scores the first. The answer depends on the scores alone, not on the device or on how
    they are cut into blocks: 1-D float32 or float64 tensors of any lengths, in order of their flat
    index, on one device.
    """
    # Candidates in order of their index: the best k at the last look, and what came since and was
    # better than the worst of them. They are looked through when there are twice as many as needed,
    # so that a large k costs no pass for each block. Selecting is numpy's: on large k it is several
    # times as fast as torch, and only what beats the limit comes over from a GPU.
    best, where = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    limit: float | None = None  # the lowest of k scores; an equal one that comes now is too late
    start, count, device = 0, 0, torch.device("cpu")
    for scores in blocks:
        numel, device = scores.numel(), scores.device
        refuse_nan(scores, lambda at, start=start: f"flat entry {start + at}")  # type: ignore[misc]
        if limit is None:
            found = torch.arange(numel, device=device)
        else:
            found = (scores > limit).nonzero().squeeze(1)
            scores = scores[found]
        if found.numel():
            best.append(scores.cpu().numpy())
            where.append(found.cpu().numpy() + start)
            count += found.numel()
        start += numel
        if count >= (k if limit is None else 2 * k):
            best, where, limit = _highest(best, where, k)
            count = k
    if count < k:
        raise MaskError(f"{k} entries cannot be chosen among {start}")
    _, (chosen,), _ = _highest(best, where, k)
    return torch.from_numpy(chosen).to(device)


def top_k_of_all(
    scores: Mapping[str, Iterable[Tensor]], sizes: Mapping[str, int], k: int
) -> dict[str, Tensor]:
    """Return the flat indices of each tensor's entries among the k of highest score of all."""
    blocks = itertools.chain.from_iterable(scores.values())
    flat = top_k(blocks, k) if k else torch.empty(0, dtype=torch.int64, device="cpu")
    found, start = {}, 0
    for name in scores:
        ends = torch.tensor([start, start + sizes[name]], device=flat.device)
        low, high = torch.searchsorted(flat, ends).tolist()
        found[name] = flat[low:high] - start
        start += sizes[name]
    return found


def row_blocks(tensor: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """Yield a tensor in flat pieces of at most ``size`` entries, in logical row-major order.

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


def check_scored(
    tensor: Tensor | None, what: str, shape: Sequence[int] | None = None, who: str = "the mask"
) -> Tensor:
    """Return a weight or gradient to score, detached, if it has values to look at, one an entry."""
    if tensor is None:
        how = "; run `config = shira.calibrate(model, config, batches)` first and pass the config "
        how = f"{how}it returns to get_peft_model" if what == "gradient" else ""
        raise MaskError(f"{who} needs the {what}, but none was passed{how}")
    if not isinstance(tensor, Tensor):
        raise MaskError(f"the {what} is a tensor, not {type(tensor).__name__}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise MaskError(f"the {what} has shape {tuple(tensor.shape)}, the mask {tuple(shape)}")
    if not tensor.is_floating_point():
        raise MaskError(f"the {what} holds floating point numbers, not {tensor.dtype}")
    if tensor.is_meta:
        raise MaskError(
            f"the {what} is on the meta device and has no values to choose by; load it first, or "
            "choose by position: mask_type 'random' or 'struct'"
        )
    return tensor.detach()


def refuse_nan(scores: Tensor, name_of: Callable[[int], str]) -> None:
    """Refuse scores that are not numbers; ``name_of`` says which of them the first such is."""
    if scores.numel() and bool(scores.max().isnan()):  # a maximum hands NaN on
        first = int(scores.isnan().nonzero()[0])
        raise MaskError(
            f"the score of {name_of(first)} is not a number (NaN), so there is no order; look for "
            "NaN or infinity in the weight or its gradient"
        )


def _highest(
    best: list[NDArray[np.floating]], where: list[NDArray[np.int64]], k: int
) -> tuple[list[NDArray[np.floating]], list[NDArray[np.int64]], float]:
    """Return the k best scores and their indices, each as one piece, and the worst of them."""
    scores, indices = np.concatenate(best), np.concatenate(where)
    limit = float(np.partition(scores, scores.size - k)[scores.size - k])
    chosen = scores > limit
    level = np.flatnonzero(scores == limit)  # of equal scores the first
    chosen[level[: k - int(np.count_nonzero(chosen))]] = True
    kept = np.flatnonzero(chosen)
    return [scores[kept]], [indices[kept]], limit
