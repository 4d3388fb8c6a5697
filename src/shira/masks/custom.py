# SPDX-License-Identifier: Apache-2.0
"""The mask that a user's own ``mask_fn`` returned, made a `Support`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shira.errors import MaskError, SupportError
from shira.masks.budget import check_fits
from shira.support import Support


def custom_support(mask: Tensor | Support, shape: Sequence[int], k: int, *, what: str) -> Support:
    """Return a user's mask as a support, after making sure that it fits the weight and the budget.

    A dense mask costs O(numel), as it did its author; a `Support` costs nothing.

    Args:
        mask: 0/1 or boolean tensor of the weight's shape, of any dtype and on any device, or a
            `Support` of that shape.
        shape: Shape of the weight as stored.
        k: How many entries there must be.
        what: Who speaks, at the head of the error: ``"mask_fn for layer model.fc1"``.

    Returns:
        A support of exactly k entries, on the mask's device.

    Raises:
        MaskError: If it is neither, has another shape or count, or holds other values than 0 and 1.
    """
    shape = tuple(shape)
    check_fits(shape, k)
    if not isinstance(mask, (Tensor, Support)):
        raise MaskError(
            f"{what} returned {type(mask).__name__}; it returns a 0/1 tensor of the weight's shape "
            f"{shape}, or a shira.Support"
        )
    if isinstance(mask, Tensor) and (mask.layout != torch.strided or mask.is_meta):
        kind = "on the meta device" if mask.is_meta else f"of layout {mask.layout}"
        raise MaskError(
            f"{what} returned a tensor {kind}; a dense mask, or a shira.Support, is read"
        )
    if tuple(mask.shape) != shape:
        turned = " (it is transposed)" if tuple(mask.shape)[::-1] == shape else ""
        raise MaskError(
            f"{what} returned a mask of shape {tuple(mask.shape)}{turned}, but the weight is "
            f"stored with shape {shape}"
        )
    if isinstance(mask, Support):
        support = mask
    else:
        try:
            support = Support.from_mask(mask.detach())
        except SupportError as error:
            raise MaskError(f"{what} returned no mask: {error}") from error
    if support.nnz != k:
        raise MaskError(
            f"{what} returned a mask with {support.nnz} ones, but the budget is {k}: "
            "r * (m + n), or density * m * n"
        )
    return support
