# SPDX-License-Identifier: Apache-2.0
"""The `magnitude` mask: the largest (or smallest) weights of a layer."""

from __future__ import annotations

from torch import Tensor

from shira.base import accumulation_dtype
from shira.masks.budget import check_fits
from shira.masks.topk import check_scored, row_blocks, top_k
from shira.support import Support


def magnitude_support(weight: Tensor, k: int, *, largest: bool = True) -> Support:
    """Choose the k entries of largest ``abs(w)`` (paper B.3, SHiRA-WM).

    Reads the weight once, block by block; no temporary of its size is made. Of entries of equal
    magnitude the first are taken, so the mask is the same on every device.

    Args:
        weight: The weight as stored, of any shape, strides and floating dtype.
        k: How many entries.
        largest: False takes the smallest instead.

    Returns:
        A support of exactly k entries, on the weight's device.

    Raises:
        MaskError: If k entries do not fit, or the weight holds NaN, no floats, or no values (meta).
    """
    weight = check_scored(weight, "weight")
    check_fits(weight.shape, k)
    if not k:
        return Support._trusted(weight.shape, weight.new_empty(0).long())
    wide = accumulation_dtype(weight.dtype)
    scores = (block.to(wide).abs() for block in row_blocks(weight))
    if not largest:
        scores = (-score for score in scores)
    return Support._trusted(weight.shape, top_k(scores, k))
