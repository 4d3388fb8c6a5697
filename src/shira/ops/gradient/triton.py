# SPDX-License-Identifier: Apache-2.0
"""``(left^T right)[S]`` through a Triton kernel, which has not been measured on a GPU.

No dense gradient reaches memory. The product is made tile by tile, as any matrix product is. Where
that would write a tile to memory, this writes its chosen positions only::

    plan:    entries sorted by tile;  start[t] : start[t + 1]  are those of tile t,
             local = place within the tile,  dest = place in the result
    kernel:  one program a tile that has entries (tiles without any are not computed)
             tile = sum over tokens of left^T right          in registers, float32
             out[dest[e]] = tile.flatten()[local[e]]         a gather in shared memory

Memory beyond the operands is the result and 6 bytes an entry for the lists, kept with the plan.
The entries are taken out of the tile by a *gather* (``tl.gather``): the tile goes through shared
memory once, so the cost is that of the tile, not of tile x entries as with one-hot products or
masked sums, and there is no scratch in global memory.

Triton is optional and loaded on first use. Without a GPU, Triton's interpreter
(``TRITON_INTERPRET=1``, set before Triton is imported) runs the same kernel slowly; the tests do.
Tile sizes have been chosen by counting bytes, not by measurement.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from shira.errors import MissingDependencyError
from shira.ops.plan import Plan

_GROUP = 8  # rows of tiles that are gone through column by column, so that operands stay in L2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Rows, columns and tokens at a time of one program: powers of two, at least 16."""

    rows: int
    cols: int
    tokens: int
    warps: int


TILE_HALF = Tile(128, 128, 64, 8)
"""For bfloat16 and float16: 64 KiB of float32 a tile, 32 KiB of operands a step."""
TILE_FLOAT = Tile(64, 64, 32, 4)
"""For float32."""


class TileLists(NamedTuple):
    """The entries of a plan, tile by tile, as the kernel takes them."""

    row: Tensor
    col: Tensor
    start: Tensor
    local: Tensor
    dest: Tensor
    most: int
    """Entries of the fullest tile."""


def available(
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.float32
) -> tuple[bool, str]:
    """Return whether `triton_weight_gradient` takes such operands, and why; imports nothing."""
    if dtype not in _DTYPES:
        return False, f"the Triton kernel adds up in float32, which is too little for {dtype}"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (pip install triton)"
    kind = torch.device(device).type
    if interpreted():
        return kind in ("cpu", "cuda"), "Triton's interpreter is on (TRITON_INTERPRET): for tests"
    if kind != "cuda":
        return False, f"Triton's kernels run on a GPU, not on {kind}"
    return True, "Triton is installed and the operands are on a GPU"


def interpreted() -> bool:
    """Return whether Triton would run kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_weight_gradient(
    left: Tensor, right: Tensor, plan: Plan, wide: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """Compute ``(left^T right)`` at the plan's support, without a dense gradient in memory.

    Float32 operands are multiplied in float32; TF32 is used where
    ``torch.backends.cuda.matmul.allow_tf32`` says that it may. The result is the same at each call.
    Arguments as for `shira.ops.weight_gradient`; the result is accumulated in float32.

    Raises:
        MissingDependencyError: If Triton is not installed.
        ValueError: If the kernel cannot take such operands; see `available`.
    """
    fits, why = available(left.device, left.dtype)
    if not fits:
        missing = importlib.util.find_spec("triton") is None
        raise (MissingDependencyError if missing else ValueError)(why)
    from shira.ops.gradient.triton_kernel import sampled_tile

    # Positions without tokens are zero; all others are written by exactly one program.
    tokens = left.shape[0]
    out = torch.zeros(plan.nnz, dtype=torch.float32, device=left.device)
    if not plan.nnz or not tokens:
        return out.to(wide)
    tile = tile or (TILE_FLOAT if left.dtype == torch.float32 else TILE_HALF)
    tiles = plan.memo(tile, make_tile_lists, plan, tile)
    tf32 = left.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    sizes = tokens, *plan.shape, *left.stride(), *right.stride()
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]  # Triton launches there
        sampled_tile[(tiles.row.numel(),)](
            *(left, right, out, *tiles[:5], *sizes),
            TILE_ROWS=tile.rows,
            TILE_COLS=tile.cols,
            TILE_TOKENS=tile.tokens,
            ENTRIES=min(1024, max(16, 1 << (tiles.most - 1).bit_length())),
            PRECISION="tf32" if tf32 else "ieee",
            WIDEN=interpreted(),
            num_warps=tile.warps,
        )
    return out.to(wide)


def make_tile_lists(plan: Plan, tile: Tile) -> TileLists:
    """Sort the entries of a plan by tile; tiles come in the order in which they should run."""
    down, across = (-(-size // edge) for size, edge in zip(plan.shape, tile[:2], strict=True))
    row, col = (half.long() for half in plan.pattern()[1:])
    tile_row, tile_col = row // tile.rows, col // tile.cols
    # Groups of _GROUP tile rows, in each of them column by column.
    number = (tile_row // _GROUP * across + tile_col) * _GROUP + tile_row % _GROUP
    number, dest = torch.sort(number, stable=True)
    ids, counts = torch.unique_consecutive(number, return_counts=True)
    start = torch.zeros(ids.numel() + 1, dtype=torch.int32, device=row.device)
    start[1:] = counts.cumsum(0)
    group = ids // _GROUP
    local = (row % tile.rows * tile.cols + col % tile.cols)[dest]
    small = tile.rows * tile.cols <= 2**15
    return TileLists(
        ((group // across * _GROUP + ids % _GROUP) * tile.rows).int(),
        (group % across * tile.cols).int(),
        start,
        local.to(torch.int16 if small else torch.int32),
        dest.int(),
        int(counts.max()) if down else 0,
    )
