# SPDX-License-Identifier: Apache-2.0
"""The weight gradient alone, way by way, against the dense product that it stands in for.

``dense`` is ``left^T right`` written to memory: what full fine-tuning pays, and what a product of
this size costs on this device. The others give its entries at a support of r * (m + n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_expected import gradient, seconds
from benchmarks.timing import Laps, interleave, ratios, summary

TOLERANCE = 2e-2  # of bfloat16 operands and float32 sums, relative to the norm
SCRATCH_MIB = (4, 16, 64, 256)


def measure(
    shape: tuple[int, int],
    r: int,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    sync: Callable[[], None],
) -> dict[str, Any]:
    """Seconds of each way, and their ratio to the dense product.

    Raises:
        RuntimeError: If a way gives another gradient than the dense product.
    """
    rows, cols = shape
    left = torch.randn(tokens, rows, device=device).to(dtype)
    right = torch.randn(tokens, cols, device=device).to(dtype)
    ways, flat = _ways(shape, r, left, right)
    dense = (left.t() @ right).float().view(-1)
    for name, work in ways.items():
        if name == "dense":
            continue
        want = dense[flat["block" if name.startswith("block") else "random"].long()]
        difference = float((work() - want).norm() / want.norm())
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the gradient of {name} is off by {difference:.2g} at {shape}")
    del dense

    def timed(work: Callable[[], Tensor]) -> Callable[[], Laps]:
        def run() -> Laps:
            sync()
            laps = Laps()
            work()
            sync()
            laps.mark("product")
            return laps

        return run

    laps = interleave({name: timed(work) for name, work in ways.items()}, repeats, warmup=3)
    walls = {name: [lap.total.wall for lap in kept] for name, kept in laps.items()}
    return {
        name: {
            "wall_seconds": {**summary(samples), "samples": samples},
            "over_dense": ratios(samples, walls["dense"]),
            "expected_seconds": seconds(gradient(name, tokens, rows, cols, r)),
        }
        for name, samples in walls.items()
    }


def _ways(
    shape: tuple[int, int], r: int, left: Tensor, right: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Tensor]]:
    from shira.masks import block_support, random_support
    from shira.ops import make_plan, weight_gradient
    from shira.ops.gradient import chunked, scratch_bytes, set_scratch_bytes
    from shira.ops.gradient.triton import available, triton_weight_gradient

    rows, cols = shape
    k = r * (rows + cols)
    supports = {
        "random": random_support(shape, k, seed=0).to(left.device),
        "block": block_support(shape, k, seed=0, block_size=64).to(left.device),
    }
    plans = {
        name: make_plan([support.coordinates()], shape, (cols, 1))
        for name, support in supports.items()
    }

    def in_scratch(mib: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            kept = scratch_bytes()
            set_scratch_bytes(mib * 2**20)
            try:
                return chunked(left, right, plans["random"], torch.float32)
            finally:
                set_scratch_bytes(kept)

        return run

    ways: dict[str, Callable[[], Tensor]] = {"dense": lambda: left.t() @ right}
    for mib in SCRATCH_MIB:
        ways[f"random, chunked, {mib} MiB"] = in_scratch(mib)
    if available(left.device, left.dtype)[0]:
        for name, plan in plans.items():
            ways[f"{name}, triton"] = lambda plan=plan: triton_weight_gradient(
                left, right, plan, torch.float32
            )
    for name, plan in plans.items():
        ways[f"{name}, as chosen"] = lambda plan=plan: weight_gradient(left, right, plan)
    return ways, {name: support.indices for name, support in supports.items()}
