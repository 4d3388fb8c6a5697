# SPDX-License-Identifier: Apache-2.0
"""What each op means, in plain differentiable torch; slow, dense, and right.

The fast ops beside this file are tested against these functions. They make dense temporaries of
the weight's size, which nothing else in shira does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shira.base import accumulation_dtype
from shira.support import matrix_shape


def gather(weight: Tensor, flat: Tensor) -> Tensor:
    """``weight.flatten()[flat]``: the ``(k,)`` values of a weight at flat, row-major indices."""
    return weight.reshape(-1)[flat.long()]


def scatter(weight: Tensor, flat: Tensor, values: Tensor) -> Tensor:
    """A copy of ``weight`` with ``values`` ``(k,)`` in the place of its entries at ``flat``."""
    return weight.reshape(-1).index_put((flat.long(),), values).view(weight.shape)


def adapted_weight(weight: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """The weight plus the sum of all deltas, summed wide and rounded once; differentiable.

    Args:
        weight: Any shape, floating point.
        deltas: ``(k_i,)`` each, floating point.
        indices: ``(2, k_i)`` each, row and column of the weight seen as a matrix.
    """
    _, cols = matrix_shape(weight.shape)
    wide = weight.to(accumulation_dtype(weight.dtype, *(delta.dtype for delta in deltas)))
    total = torch.zeros_like(wide).reshape(-1)
    for delta, coordinates in zip(deltas, indices, strict=True):
        flat = coordinates[0].long() * cols + coordinates[1].long()
        total = total.index_add(0, flat, delta.to(wide.dtype))
    return (wide + total.view(weight.shape)).to(weight.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    """``x W^T + bias`` (``x W + bias`` if ``transposed``) with the adapted weight."""
    adapted = adapted_weight(weight, deltas, indices).to(x.dtype)
    return F.linear(x, adapted.t() if transposed else adapted, bias)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    transposed: bool = False,
    **options,
) -> Tensor:
    """``torch.nn.functional.conv1d`` to ``conv_transpose3d`` with the adapted weight."""
    adapted = adapted_weight(weight, deltas, indices).to(x.dtype)
    name = f"conv_transpose{weight.dim() - 2}d" if transposed else f"conv{weight.dim() - 2}d"
    return getattr(F, name)(x, adapted, bias, **options)


def embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    padding_idx: int = -1,
) -> Tensor:
    """``torch.nn.functional.embedding`` with the adapted weight; -1 means no padding index."""
    adapted = adapted_weight(weight, deltas, indices)
    return F.embedding(ids, adapted, padding_idx if padding_idx >= 0 else None)


def weight_gradient(left: Tensor, right: Tensor, flat: Tensor) -> Tensor:
    """``(left^T right)[S]``: the weight gradient at a support.

    Args:
        left: ``(tokens, rows)``.
        right: ``(tokens, cols)``.
        flat: ``(k,)`` flat indices into the ``(rows, cols)`` product.

    Returns:
        ``(k,)``, accumulated in float32 (float64 for float64 inputs).
    """
    wide = accumulation_dtype(left.dtype, right.dtype)
    return gather(torch.mm(left.t().to(wide), right.to(wide)), flat)


def sparse_product(
    x: Tensor,
    delta: Tensor,
    indices: Tensor,
    shape: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """``x dW^T`` (``x dW`` if ``transposed``), dW dense with ``delta`` at its positions.

    Args:
        x: ``(tokens, in)``.
        delta: ``(k,)``.
        indices: ``(2, k)`` rows and columns of dW.
        shape: Of dW.
        transposed: dW is stored ``(in, out)``.
    """
    wide = accumulation_dtype(x.dtype, delta.dtype)
    nothing = torch.zeros(*shape, dtype=wide, device=x.device)
    return linear(x.to(wide), nothing, None, [delta.to(wide)], [indices], transposed)
