# SPDX-License-Identifier: Apache-2.0
"""``(left^T right)[S]``: the gradient of a weight at a support, without the dense gradient.

The ways to compute it are the backends of ``dispatch``; this file calls the one that it chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.ops import native
from shira.ops.chunked import chunked
from shira.ops.dispatch import backend_told, choose
from shira.ops.plan import Plan
from shira.ops.sampled import sampled
from shira.ops.tiles import tiled
from shira.ops.triton_gradient import triton_weight_gradient


def weight_gradient(left: Tensor, right: Tensor, plan: Plan) -> Tensor:
    """``(left^T right)`` at the plan's support.

    Args:
        left: ``(tokens, rows)``.
        right: ``(tokens, cols)``, same dtype.
        plan: Of a support on a weight that is a ``(rows, cols)`` matrix.

    Returns:
        ``(k,)``, accumulated and returned in float32 (float64 for float64 operands).
    """
    wide = accumulation_dtype(left.dtype, right.dtype)
    if not plan.nnz or not left.shape[0]:
        return torch.zeros(plan.nnz, dtype=wide, device=left.device)
    way = plan.memo((backend_told(), left.dtype), lambda: _choose(left, plan))
    return _WAYS[way](left, right, plan, wide)


def _choose(left: Tensor, plan: Plan) -> str:
    return choose(left.device, left.dtype, plan.density, tiled=plan.tiles is not None).name


def compiled(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """The ``native`` backend."""
    kernels = native.load().library
    assert kernels is not None
    return kernels.entries(left, right, *plan.compressed())


_WAYS = {
    "tiles": tiled,
    "native": compiled,
    "sampled": sampled,
    "chunked": chunked,
    "triton": triton_weight_gradient,
}
