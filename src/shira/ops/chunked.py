# SPDX-License-Identifier: Apache-2.0
"""The ``chunked`` backend: dense rows of the gradient in a bounded buffer, gathered, thrown away.

2 * tokens * rows * cols operations, which tensor cores and dense supports make the faster way.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from shira.errors import ConfigError
from shira.ops.plan import Plan

_scratch_bytes = 64 * 2**20


def scratch_bytes() -> int:
    """The most memory that a piece of the dense gradient takes: ``SHIRA_SCRATCH_BYTES``, 64 MiB.

    Raises:
        ConfigError: If the environment variable is not a positive whole number.
    """
    told = os.environ.get("SHIRA_SCRATCH_BYTES")
    if told is None:
        return _scratch_bytes
    if not told.isdecimal() or not int(told):
        raise ConfigError(f"SHIRA_SCRATCH_BYTES is a positive number of bytes, not {told!r}")
    return int(told)


def set_scratch_bytes(size: int) -> None:
    """Bound the buffer of the ``chunked`` backend; at least one row is always made.

    Raises:
        ConfigError: If the size is not positive.
    """
    global _scratch_bytes
    if size < 1:
        raise ConfigError(f"scratch memory is a positive number of bytes, not {size}")
    _scratch_bytes = size


def chunked(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Arguments and result as `shira.ops.weight_gradient`; ``wide`` is the result's dtype."""
    crow, row, col = plan.pattern()
    starts = plan.memo("starts", crow.tolist)
    rows, cols = plan.shape
    product_dtype = wide if left.device.type == "cpu" else left.dtype
    step = max(1, scratch_bytes() // max(1, cols * wide.itemsize))
    out = torch.empty(plan.nnz, dtype=wide, device=left.device)
    right = right.to(product_dtype)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        begin, end = starts[first], starts[last]
        if begin == end:
            continue
        piece = left[:, first:last].t().to(product_dtype) @ right  # (last - first, cols)
        place = (row[begin:end].long() - first) * cols + col[begin:end]
        out[begin:end] = piece.view(-1).index_select(0, place)
    return out
