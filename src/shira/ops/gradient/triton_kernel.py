# SPDX-License-Identifier: Apache-2.0
"""The kernel of ``triton.py``, not measured on a GPU; a file of its own, as importing needs Triton.

One program makes one tile of ``left^T right`` in registers and writes the chosen positions of it,
and nothing else, to memory.
"""

from __future__ import annotations

import triton  # optional: this module is imported on first use only
import triton.language as tl


@triton.jit
def sampled_tile(  # type: ignore[no-untyped-def]
    left,  # (tokens, rows)
    right,  # (tokens, cols)
    out,  # (k,) float32
    tile_row,  # (tiles,) int32: which tiles, first row and
    tile_col,  # (tiles,) int32: first column of each
    start,  # (tiles + 1,) int32: where the entries of each tile begin
    local,  # (k,) int16 or int32: row * TILE_COLS + column within the tile
    dest,  # (k,) int32: place of the entry in out
    tokens,
    rows,
    cols,
    left_token,  # strides
    left_row,
    right_token,
    right_col,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # no annotation but constexpr: Triton reads them
    """Set out[dest[e]] to the tile's product at local[e], for the entries e of one tile."""
    tile = tl.program_id(0)
    # Said, or loads would be entry by entry: what comes from memory is not known to be aligned.
    row = tl.multiple_of(tl.load(tile_row + tile), TILE_ROWS) + tl.arange(0, TILE_ROWS)
    col = tl.multiple_of(tl.load(tile_col + tile), TILE_COLS) + tl.arange(0, TILE_COLS)
    token = tl.arange(0, TILE_TOKENS)
    # 64-bit steps: tokens * rows may exceed 2^31
    left_at = left + row[:, None].to(tl.int64) * left_row + token[None, :].to(tl.int64) * left_token
    right_at = (
        right + token[:, None].to(tl.int64) * right_token + col[None, :].to(tl.int64) * right_col
    )
    total = tl.zeros((TILE_ROWS, TILE_COLS), dtype=tl.float32)
    for first in range(0, tokens, TILE_TOKENS):
        here = token < tokens - first
        a = tl.load(left_at, mask=(row < rows)[:, None] & here[None, :], other=0.0)
        b = tl.load(right_at, mask=here[:, None] & (col < cols)[None, :], other=0.0)
        if WIDEN:  # the interpreter multiplies the bits of bfloat16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_at += TILE_TOKENS * left_token
        right_at += TILE_TOKENS * right_token
    flat = tl.reshape(total, (TILE_ROWS * TILE_COLS,))
    begin = tl.load(start + tile)
    end = tl.load(start + tile + 1)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        chosen = entry < end
        place = tl.load(local + entry, mask=chosen, other=0).to(tl.int32)
        # through shared memory, within the program: no tile is ever written to global memory
        value = tl.gather(flat, place, 0)
        tl.store(out + tl.load(dest + entry, mask=chosen, other=0), value, mask=chosen)
