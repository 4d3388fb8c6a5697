# SPDX-License-Identifier: Apache-2.0
"""The `grad` and `snip` masks: where the loss says that training will matter."""

from __future__ import annotations

from torch import Tensor

from shira.base import accumulation_dtype
from shira.errors import MaskError
from shira.masks.budget import check_fits
from shira.masks.magnitude import magnitude_support
from shira.masks.topk import check_scored, row_blocks, top_k
from shira.support import Support


def grad_support(gradient: Tensor, k: int) -> Support:
    """Choose the k entries of largest accumulated gradient magnitude (paper sec. 3.1, SHiRA-Grad).

    Args:
        gradient: Of the weight's shape: gradients, or their magnitudes, summed over calibration
            batches. The sign does not count.
        k: How many entries.

    Returns:
        A support of exactly k entries, on the gradient's device; of equal entries the first.

    Raises:
        MaskError: If k entries do not fit, or the gradient holds NaN, no floats, or no values
            (meta).
    """
    return magnitude_support(check_scored(gradient, "gradient"), k)


def snip_support(weight: Tensor, gradient: Tensor, k: int) -> Support:
    """Choose the k entries of largest ``abs(w * g)`` (paper eq. 2, SHiRA-SNIP).

    The product is made block by block, in float32 (float64 if either is).

    Args:
        weight: The weight as stored.
        gradient: Of the same shape, as for `grad_support`; may be on another device.
        k: How many entries.

    Returns:
        A support of exactly k entries, on the weight's device; of equal entries the first.

    Raises:
        MaskError: If the shapes differ, k entries do not fit, or either tensor holds NaN, no
            floats, or no values (meta).
    """
    weight, gradient = check_scored(weight, "weight"), check_scored(gradient, "gradient")
    if weight.shape != gradient.shape:
        raise MaskError(
            f"the gradient has the shape of its weight, {tuple(weight.shape)}, "
            f"not {tuple(gradient.shape)}"
        )
    check_fits(weight.shape, k)
    if not k:
        return Support._trusted(weight.shape, weight.new_empty(0).long())
    wide = accumulation_dtype(weight.dtype, gradient.dtype)
    pairs = zip(row_blocks(weight), row_blocks(gradient), strict=True)
    scores = (w.to(wide).mul(g.to(w.device, wide)).abs_() for w, g in pairs)
    return Support._trusted(weight.shape, top_k(scores, k))
