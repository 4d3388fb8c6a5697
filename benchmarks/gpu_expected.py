# SPDX-License-Identifier: Apache-2.0
"""What the ``gpu`` suite should find on an H100, counted: operations, bytes, and launches.

A kernel takes as long as its operations at `OPERATIONS` a second, its bytes at `BYTES` a second, or
a launch, whichever is longest; a way takes the sum of its kernels. bfloat16 weights and operands,
float32 values. Entries that are scattered cost a sector of memory each, to be read and to be
written; those of blocks lie side by side. Left out are norms, rotations, the loss, and what Python
takes to launch, so a step measured is longer, by the same for all contenders.

``python -m benchmarks.gpu_expected`` prints the tables of ``docs/gpu.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu_contenders import BLOCK_SIZE, TARGETS, Shape

OPERATIONS = 790e12  # bfloat16, tensor cores
BYTES = 3.35e12  # of the memory
LAUNCH = 3e-6  # seconds between two kernels at the least
SECTOR = 32  # bytes of memory that are read for one entry
TILE = 128  # rows and columns of a tile of the Triton kernel


class Kernel(NamedTuple):
    """What one launch does."""

    operations: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.operations / OPERATIONS, self.bytes / BYTES, LAUNCH)


def seconds(kernels: list[Kernel]) -> float:
    return sum(kernel.seconds for kernel in kernels)


def product(tokens: int, rows: int, cols: int) -> Kernel:
    """Any of ``x W^T``, ``g W`` and ``g^T x``, in bfloat16."""
    sizes = tokens * rows + tokens * cols + rows * cols
    return Kernel(2 * tokens * rows * cols, 2 * sizes)


def _scattered(k: int, numel: int, blocks: bool) -> int:
    """Bytes of memory read for k entries of a bfloat16 matrix."""
    return 2 * k if blocks else min(k * SECTOR, 2 * numel)


def put_in(k: int, numel: int, blocks: bool) -> list[Kernel]:
    """Read the originals, add, write the replacement values."""
    gather = Kernel(0, 8 * k + _scattered(k, numel, blocks) + 2 * k)
    return [gather, Kernel(k, 8 * k), take_out(k, numel, blocks)]


def take_out(k: int, numel: int, blocks: bool) -> Kernel:
    """Write the originals back; the sectors are in the cache, as the product has read them."""
    return Kernel(0, 8 * k + 2 * k + _scattered(k, numel, blocks))


def gradient(way: str, tokens: int, rows: int, cols: int, r: int) -> list[Kernel]:
    """The weight gradient at the entries, by a way of `benchmarks.gpu_kernels`."""
    k, numel = r * (rows + cols), rows * cols
    dense = product(tokens, rows, cols)
    kind, _, how = way.partition(", ")
    cast = Kernel(0, 6 * k)
    if kind == "dense":
        return [dense]
    if kind == "random" and how == "triton":
        # of a tile nothing but the entries is written
        lists = 6 * k + k * SECTOR
        return [Kernel(0, 4 * k), Kernel(dense.operations, 2 * tokens * (rows + cols) + lists)]
    if kind == "random":
        return [dense, Kernel(0, 8 * k + _scattered(k, numel, False) + 2 * k), cast]
    blocks = -(-k // BLOCK_SIZE**2)
    if how == "triton":
        tiles = min(blocks, numel // TILE**2 + 1)
        operands = 2 * 2 * tokens * TILE * tiles
        return [Kernel(0, 4 * k), Kernel(2 * tokens * TILE**2 * tiles, operands + 10 * k)]
    copied = 2 * tokens * BLOCK_SIZE * blocks
    copies = [Kernel(0, 2 * copied)] * 2
    return [*copies, Kernel(2 * tokens * k, 2 * copied + 2 * k), Kernel(0, 12 * k), cast]


def _shira(way: str, blocks: bool) -> Callable[[int, int, int, int], list[Kernel]]:
    def of_layer(tokens: int, rows: int, cols: int, r: int) -> list[Kernel]:
        k, numel = r * (rows + cols), rows * cols
        around = [*put_in(k, numel, blocks), take_out(k, numel, blocks)]
        return [*around, *around, *gradient(way, tokens, rows, cols, r)]

    return of_layer


def _peft_shira(tokens: int, rows: int, cols: int, r: int) -> list[Kernel]:
    """A copy of the weight, the values added to it; the dense gradient, and of it the entries."""
    k, numel = r * (rows + cols), rows * cols
    added = Kernel(0, 16 * k + 4 * k + 2 * k * SECTOR)
    gather = Kernel(0, 16 * k + k * SECTOR + 4 * k)
    return [Kernel(0, 4 * numel), added, product(tokens, rows, cols), gather]


def _peft_lora(tokens: int, rows: int, cols: int, r: int) -> list[Kernel]:
    down, up = product(tokens, r, cols), product(tokens, rows, r)
    wide, narrow = tokens * rows, tokens * cols
    scaled, added = Kernel(wide, 4 * wide), Kernel(wide, 6 * wide)
    back = [Kernel(wide, 4 * wide), up, up, down, down, Kernel(narrow, 6 * narrow)]
    return [down, up, scaled, added, *back]


LAYERS = {
    "shira": _shira("random, chunked", False),
    "shira-triton": _shira("random, triton", False),
    "shira-block": _shira("block, as chosen", True),
    "peft-shira": _peft_shira,
    "peft-lora": _peft_lora,
}
"""What a layer's step takes beside the products of the base, by contender."""


def steps(shape: Shape, which: str, r: int, batch: int, tokens: int) -> dict[str, float]:
    """Seconds of a step of each contender."""
    h, i = shape.hidden, shape.intermediate
    kv = h // shape.heads * shape.kv_heads
    block = dict(zip(TARGETS["all"], [(h, h), (kv, h), (kv, h), (h, h)], strict=False))
    block |= {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    all_tokens = batch * tokens
    # causal attention, forward and 2.5 times that backward
    attention = Kernel(3.5 * 2 * batch * tokens**2 * h, 3.5 * 8 * all_tokens * h)
    products = [product(all_tokens, *size) for size in block.values()]
    floor = shape.layers * seconds([*products, *products, attention])
    floor += seconds([product(all_tokens, shape.vocab, h)] * 2)
    found = {"floor": floor}
    for name, of_layer in LAYERS.items():
        extra = [kernel for t in TARGETS[which] for kernel in of_layer(all_tokens, *block[t], r)]
        found[name] = floor + shape.layers * seconds(extra)
    return found


def markdown() -> str:
    """The tables of ``docs/gpu.md``: Llama-3.2-3B, 4 x 512 tokens, r = 32."""
    shape, r, batch, tokens = Shape(), 32, 4, 512
    lines = ["| a step, targets | " + " | ".join(["floor", *LAYERS]) + " |"]
    lines.append("| --- |" + " --: |" * (len(LAYERS) + 1))
    for which in TARGETS:
        found = steps(shape, which, r, batch, tokens)
        floor = found.pop("floor")
        cells = [f"{1e3 * floor:.1f} ms", *(f"{s / floor:.2f} x" for s in found.values())]
        lines.append(f"| {which} | " + " | ".join(cells) + " |")
    ways = ("dense", "random, chunked", "random, triton", "block, as chosen", "block, triton")
    lines += ["", "| weight gradient, ms | " + " | ".join(ways) + " |"]
    lines.append("| --- |" + " --: |" * len(ways))
    h, i = shape.hidden, shape.intermediate
    for rows, cols in ((h, h), (i, h), (h, i)):
        times = (seconds(gradient(way, batch * tokens, rows, cols, r)) for way in ways)
        lines.append(f"| {rows} x {cols} | " + " | ".join(f"{1e3 * t:.3f}" for t in times) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
