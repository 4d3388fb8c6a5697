# SPDX-License-Identifier: Apache-2.0
"""`add_products` on a GPU: one Triton kernel for all adapters of a batch, not measured on one yet.

The tokens of a group are taken `Tile.tokens` at a time. One program adds what an adapter's entries
in some rows of the weight make of these tokens::

    tile:    group, first token in `rows`, tokens
    program: for each of its rows, the row's entries, `Tile.entries` at a time:
                 total[token, row] += sum over entries of value * x[token, column]
             y[token, row] = round(y[token, row] + total)

Entries are read once for a tile of tokens, in order; what they multiply is gathered from ``x``,
which the caches hold. No two programs write to one place, so that the result is the same at each
call. A group's values and positions are wherever its adapter keeps them: the kernel is handed their
addresses, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton  # optional: this module is imported on first use only
import triton.language as tl
from torch import Tensor

from shira.ops.delta_product import columns_of, rows_of
from shira.ops.plan import plan_for


class Tile(NamedTuple):
    """Tokens, rows of the result, and entries of a row at a time of one program: powers of two."""

    tokens: int
    rows: int
    entries: int
    warps: int


ONE = Tile(1, 32, 32, 4)
"""For groups of one token, as in decoding."""
SEVERAL = Tile(4, 16, 32, 4)

_KINDS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def add_products(
    result: Tensor,
    x: Tensor,
    rows: Tensor,
    counts: Sequence[int],
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    shape: tuple[int, int],
    transposed: bool,
    tile: Tile | None = None,
) -> Tensor:
    """Add ``x dW^T`` to rows of a product: `shira.ops.add_products` on a GPU.

    Operands are float32, bfloat16 or float16, the deltas of one dtype and contiguous.
    """
    tile = tile or (ONE if max(counts, default=0) <= 1 else SEVERAL)
    fan_out = result.shape[1]
    tiles = _tiles(tuple(counts), tile.tokens, x.device)
    if not fan_out or not tiles.shape[1]:
        return result
    plans = [plan_for([index], shape, (shape[1], 1)) for index in indices]
    patterns = [(columns_of if transposed else rows_of)(plan) for plan in plans]
    numbers = [
        (delta.data_ptr(), *map(Tensor.data_ptr, pattern))
        for delta, pattern in zip(deltas, patterns, strict=True)
    ]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches there
        _add_entries[(triton.cdiv(fan_out, tile.rows), tiles.shape[1])](
            *(x, result, rows, tiles, _on_device(tuple(numbers), x.device)),
            *(tiles.shape[1], fan_out, *x.stride(), result.stride(0)),
            VALUES=_KINDS[deltas[0].dtype],
            ORDERED=transposed,
            TOKENS=tile.tokens,
            ROWS=tile.rows,
            ENTRIES=tile.entries,
            num_warps=tile.warps,
        )
    return result


@lru_cache(maxsize=256)
def _on_device(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return a table of 64-bit numbers; the same at each step, so that nothing is copied then."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _tiles(counts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Return int32 ``(3, tiles)``: the group of each, its first row in the order, and tokens."""
    found, begin = [], 0
    for group, count in enumerate(counts):
        for first in range(0, count, size):
            found.append((group, begin + first, min(size, count - first)))
        begin += count
    return torch.tensor(found, dtype=torch.int32, device=device).view(-1, 3).t().contiguous()


@triton.jit
def _add_entries(  # type: ignore[no-untyped-def]
    x,  # (tokens, in)
    y,  # (tokens, out), rows contiguous
    order,  # int64: the tokens of the first group, of the second, and so on
    tiles,  # (3, count) int32: group, first place in `order`, tokens
    addresses,  # (groups, 4) int64: of values, and of a `Pattern` or of columns_of(plan)
    count,
    fan_out,
    x_token,  # strides
    x_feature,
    y_token,
    VALUES: tl.constexpr,
    ORDERED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # no annotation but constexpr: Triton reads them
    """Add one adapter's entries in some rows of the weight, for one tile of its tokens."""
    tile = tl.program_id(1)
    address = addresses + 4 * tl.load(tiles + tile)
    values = tl.load(address).to(tl.pointer_type(VALUES))
    crow = tl.load(address + 1).to(tl.pointer_type(tl.int32))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.load(crow + row, mask=row < fan_out, other=0)
    stop = tl.load(crow + row + 1, mask=row < fan_out, other=0)
    number = tl.arange(0, TOKENS)
    there = number < tl.load(tiles + 2 * count + tile)
    token = tl.load(order + tl.load(tiles + count + tile) + number, mask=there, other=0)
    inputs = x + token * x_token
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for first in range(0, tl.max(stop - start), ENTRIES):
        entry = start[:, None] + first + tl.arange(0, ENTRIES)[None, :]  # (rows, entries)
        here = entry < stop[:, None]
        if ORDERED:
            column = tl.load(address + 2).to(tl.pointer_type(tl.int32))
            at = tl.load(tl.load(address + 3).to(tl.pointer_type(tl.int64)) + entry, mask=here)
        else:
            column = tl.load(address + 3).to(tl.pointer_type(tl.int32))
            at = entry
        value = tl.load(values + at, mask=here, other=0.0).to(tl.float32)
        feature = tl.load(column + entry, mask=here, other=0).to(tl.int64) * x_feature
        got = tl.load(
            inputs[:, None, None] + feature[None, :, :],
            mask=there[:, None, None] & here[None, :, :],
            other=0.0,
        )
        total += tl.sum(value[None, :, :] * got.to(tl.float32), axis=2)
    where = y + (token * y_token)[:, None] + row[None, :]
    wanted = there[:, None] & (row < fan_out)[None, :]
    before = tl.load(where, mask=wanted, other=0.0)
    tl.store(where, (before.to(tl.float32) + total).to(before.dtype), mask=wanted)
