# SPDX-License-Identifier: Apache-2.0
"""``(left^T right)[S]``: the gradient of a weight at a support, without the dense gradient.

Two ways, chosen by `choose`:

- ``sampled``: a dot product for each entry of the support, through torch's
  ``sparse.sampled_addmm`` (CPU with MKL); 2 * tokens * k operations.
- ``chunked``: the dense product some rows at a time in a bounded scratch buffer, each chunk
  gathered and thrown away; 2 * tokens * rows * cols operations, which tensor cores and dense
  supports make the faster way.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from shira.delta import accumulation_dtype
from shira.ops.plan import Plan
from shira.ops.util import quiet_about_csr

SCRATCH_BYTES = 64 * 2**20
"""The most memory that the chunked way takes for a piece of the dense gradient."""

_TOKENS_AT_A_TIME = 256  # of the sampled way: 1 MiB of a 1024-column operand in float32
_SAMPLED_DENSITY = 0.1  # above it a dense product is faster than single dot products


class Choice(NamedTuple):
    """Which way was chosen, and why."""

    name: str
    why: str


def choose(device: torch.device | str, dtype: torch.dtype, density: float) -> Choice:
    """Which way the weight gradient takes for such operands.

    Args:
        device: Where the operands are.
        dtype: Their dtype.
        density: Of the support, between 0 and 1.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return Choice("chunked", f"on {kind} a dense product in pieces beats single dot products")
    if not _has_sampled_product():
        return Choice("chunked", "this build of torch has no sparse.sampled_addmm (it needs MKL)")
    if density > _SAMPLED_DENSITY:
        return Choice("chunked", f"density {density:.3g} is over {_SAMPLED_DENSITY}")
    why = f"density {density:.3g} is at most {_SAMPLED_DENSITY}"
    if dtype not in (torch.float32, torch.float64):
        why += f"; {dtype} operands are widened to float32"
    return Choice("sampled", why)


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
    way = choose(left.device, left.dtype, plan.density)
    return (sampled if way.name == "sampled" else chunked)(left, right, plan, wide)


def sampled(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """A dot product for each entry. Arguments and result as `weight_gradient`.

    Some tokens at a time, so that the operands of a row stay in the cache: measured a third
    faster than all tokens at once (1024 x 2816 weight, 1024 tokens, 2 %).
    """
    quiet_about_csr()
    total = torch.zeros(plan.nnz, dtype=wide, device=left.device)
    for first in range(0, left.shape[0], _TOKENS_AT_A_TIME):
        tokens = slice(first, first + _TOKENS_AT_A_TIME)
        rows = left[tokens].t().to(wide, memory_format=torch.contiguous_format)  # (rows, tokens)
        pattern = torch.sparse_csr_tensor(
            plan.crow, plan.col, total, plan.shape, check_invariants=False
        )
        total = torch.sparse.sampled_addmm(pattern, rows, right[tokens].to(wide)).values()
    return total


def chunked(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Dense rows in a bounded buffer, gathered. Arguments and result as `weight_gradient`."""
    if not plan.host_crow:
        plan.host_crow.extend(plan.crow.tolist())
    rows, cols = plan.shape
    product_dtype = wide if left.device.type == "cpu" else left.dtype
    step = max(1, SCRATCH_BYTES // max(1, cols * wide.itemsize))
    out = torch.empty(plan.nnz, dtype=wide, device=left.device)
    right = right.to(product_dtype)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        begin, end = plan.host_crow[first], plan.host_crow[last]
        if begin == end:
            continue
        piece = left[:, first:last].t().to(product_dtype) @ right  # (last - first, cols)
        place = (plan.row[begin:end].long() - first) * cols + plan.col[begin:end]
        out[begin:end] = piece.view(-1).index_select(0, place)
    return out


@cache
def _has_sampled_product() -> bool:
    quiet_about_csr()
    pattern = torch.eye(1).to_sparse_csr()
    try:
        torch.sparse.sampled_addmm(pattern, torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError:
        return False
    return True
