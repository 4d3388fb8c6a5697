# SPDX-License-Identifier: Apache-2.0
"""The `magnitude`, `grad` and `snip` masks: the entries of highest score.

=============  ==================  ==========================================
mask           score of an entry   where the paper has it
=============  ==================  ==========================================
`magnitude`    ``abs(w)``          B.3, SHiRA-WM
`grad`         ``abs(g)``          sec. 3.1, SHiRA-Grad
`snip`         ``abs(w * g)``      eq. 2, SHiRA-SNIP
=============  ==================  ==========================================

Scores are made block by block; no temporary of the weight's size is. Of entries of equal score the
first are taken, so the mask is the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.masks.budget import check_fits
from shira.masks.topk import check_scored, row_blocks, top_k
from shira.support import Support


def magnitude_support(weight: Tensor, k: int, *, largest: bool = True) -> Support:
    """Choose the k entries of largest ``abs(w)`` (paper B.3, SHiRA-WM).

    Args:
        weight: The weight as stored, of any shape, strides and floating dtype.
        k: The number of entries.
        largest: False takes the smallest instead.

    Returns:
        A support of exactly k entries, on the weight's device.

    Raises:
        MaskError: If k entries do not fit, or the weight holds NaN, no floats, or no values (meta).

    Example:
        >>> shira.masks.magnitude_support(torch.tensor([[1.0, -5.0], [2.0, 0.5]]), 2).indices
        tensor([1, 2], dtype=torch.int32)
    """
    return _highest([check_scored(weight, "weight")], k, largest)


def grad_support(gradient: Tensor, k: int) -> Support:
    """Choose the k entries of largest accumulated gradient magnitude (paper sec. 3.1, SHiRA-Grad).

    Args:
        gradient: Of the weight's shape: gradients, or their magnitudes, summed over calibration
            batches. The sign does not count.
        k: The number of entries.

    Returns:
        A support of exactly k entries, on the gradient's device.

    Raises:
        MaskError: If k entries do not fit, or the gradient holds NaN, no floats, or no values
            (meta).
    """
    return _highest([check_scored(gradient, "gradient")], k)


def snip_support(weight: Tensor, gradient: Tensor, k: int) -> Support:
    """Choose the k entries of largest ``abs(w * g)`` (paper eq. 2, SHiRA-SNIP).

    The product is made in float32 (float64 if either is).

    Args:
        weight: The weight as stored.
        gradient: Of the same shape, as for `grad_support`; may be on another device.
        k: The number of entries.

    Returns:
        A support of exactly k entries, on the weight's device.

    Raises:
        MaskError: If the shapes differ, k entries do not fit, or either tensor holds NaN, no
            floats, or no values (meta).
    """
    weight = check_scored(weight, "weight")
    gradient = check_scored(gradient, "gradient", weight.shape)
    return _highest([weight, gradient], k)


def absolute_product(operands: list[Tensor]) -> Tensor:
    """Return the absolute product of tensors of one shape, in float32 or wider, on the first's."""
    wide = accumulation_dtype(*(tensor.dtype for tensor in operands))
    product = operands[0].to(wide)
    for other in operands[1:]:
        product = product * other.to(product.device, wide)
    return product.abs_() if len(operands) > 1 else product.abs()  # a copy, or the caller's own


def _highest(operands: list[Tensor], k: int, largest: bool = True) -> Support:
    first = operands[0]
    check_fits(first.shape, k)
    if not k:
        return Support._trusted(first.shape, first.new_empty(0, dtype=torch.int64))
    parts = zip(*map(row_blocks, operands), strict=True)
    scores = (absolute_product([*blocks]) for blocks in parts)
    return Support._trusted(first.shape, top_k(scores if largest else map(torch.neg, scores), k))
