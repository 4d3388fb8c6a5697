# SPDX-License-Identifier: Apache-2.0
"""The ``tiles`` backend: a support that fills square tiles costs one small product for each tile.

On the CPU the compiled kernel (``native/tiles.c``); elsewhere, and in float64, a batched product
over the tiles, some of them at a time so that the copies of their operands stay bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shira.ops import native
from shira.ops.chunked import scratch_bytes
from shira.ops.plan import Plan, Tiles


def tiled(left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype) -> Tensor:
    """Arguments and result as `shira.ops.weight_gradient`; ``wide`` is the result's dtype."""
    assert plan.tiles is not None
    kernels = native.load().library
    if kernels is not None and left.device.type == "cpu" and left.dtype in native.KINDS:
        at = plan.tiles
        return kernels.tiles(left, right, *plan.compressed(), at.size, at.row, at.col)
    return batched(left, right, plan, plan.tiles, wide)


def batched(left: Tensor, right: Tensor, plan: Plan, tiles: Tiles, wide: torch.dtype) -> Tensor:
    """The same through ``torch.bmm``, on any device."""
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
