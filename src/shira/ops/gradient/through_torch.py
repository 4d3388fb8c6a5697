# SPDX-License-Identifier: Apache-2.0
"""The backends of the weight gradient that torch computes: ``sampled``, ``chunked`` and tiles.

Arguments and results are those of `shira.ops.weight_gradient`; ``wide`` is the result's dtype.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from shira.errors import ConfigError
from shira.ops.plan import Plan, Tiles

_TOKENS_AT_A_TIME = 256  # 1 MiB of a 1024-column operand in float32
_scratch_bytes = 64 * 2**20


def scratch_bytes() -> int:
    """Return the most memory of a piece of the dense gradient: ``SHIRA_SCRATCH_BYTES``, or 64 MiB.

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


def sampled(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Compute a dot product for each entry, through ``torch.sparse.sampled_addmm``.

    What the CPU does where the compiled kernels are missing, and in float64. Some tokens at a time,
    so that the operands of a row stay in the cache: measured a third faster than all tokens at once
    (1024 x 2816 weight, 1024 tokens, 2 %).
    """
    silence_csr_warning()
    crow, col = plan.compressed()
    total = torch.zeros(plan.nnz, dtype=wide, device=left.device)
    for first in range(0, left.shape[0], _TOKENS_AT_A_TIME):
        tokens = slice(first, first + _TOKENS_AT_A_TIME)
        rows = left[tokens].t().to(wide, memory_format=torch.contiguous_format)  # (rows, tokens)
        pattern = torch.sparse_csr_tensor(crow, col, total, plan.shape, check_invariants=False)
        total = torch.sparse.sampled_addmm(pattern, rows, right[tokens].to(wide)).values()
    return total


@cache
def has_sampled_product() -> bool:
    """Return whether this build of torch has ``sparse.sampled_addmm`` on the CPU (it needs MKL)."""
    silence_csr_warning()
    pattern = torch.eye(1).to_sparse_csr()
    try:
        torch.sparse.sampled_addmm(pattern, torch.ones(1, 1), torch.ones(1, 1))
    except RuntimeError:
        return False
    return True


@cache
def silence_csr_warning() -> None:
    """Make torch's one warning that sparse CSR is beta here, where it tells the user nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.eye(1).to_sparse_csr()


def chunked(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Compute dense rows of the gradient in a bounded buffer, of which the entries are gathered.

    2 * tokens * rows * cols operations, which tensor cores and dense supports make the faster way.
    """
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


def batched(left: Tensor, right: Tensor, plan: Plan, tiles: Tiles, wide: torch.dtype) -> Tensor:
    """Compute the tiles in which all entries lie, through ``torch.bmm``.

    Some tiles at a time, so that the copies of their operands stay bounded.
    """
    size, count, tokens = tiles.size, tiles.row.numel(), left.shape[0]
    product_dtype = wide if left.device.type == "cpu" else left.dtype
    down, across = _in_tiles(left, size), _in_tiles(right, size)  # (tokens, tiles, size)
    at_once = max(1, scratch_bytes() // (2 * tokens * size * left.itemsize + size * size * 4))
    out = torch.empty(plan.nnz, dtype=wide, device=left.device)
    grid = torch.full(
        (-(-plan.shape[0] // size), -(-plan.shape[1] // size)), -1, device=left.device
    )
    grid[tiles.row.long(), tiles.col.long()] = torch.arange(count, device=left.device)
    row, col = (half.long() for half in plan.pattern()[1:])
    tile = grid[row // size, col // size]  # (k,) which tile an entry is in
    for first in range(0, count, at_once):
        some = slice(first, first + at_once)
        a = down[:, tiles.row[some].long()].to(product_dtype)  # (tokens, tiles, size)
        b = across[:, tiles.col[some].long()].to(product_dtype)
        products = torch.bmm(a.permute(1, 2, 0), b.permute(1, 0, 2))  # (tiles, size, size)
        here = (tile >= first) & (tile < first + at_once)
        at = (tile[here] - first, row[here] % size, col[here] % size)
        out[here] = products[at].to(wide)
    return out


def _in_tiles(operand: Tensor, size: int) -> Tensor:
    short = -operand.shape[1] % size
    if short:
        operand = torch.nn.functional.pad(operand, (0, short))
    return operand.reshape(operand.shape[0], -1, size)
