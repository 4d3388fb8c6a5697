# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from benchmarks.memory import allocator_peak
from shira.ops import make_plan, set_scratch_bytes
from shira.ops.chunked import chunked, scratch_bytes

from .cases import random_indices


def test_the_bound_on_scratch_memory_holds():
    rows, cols, k = 512, 256, 2000  # a dense gradient of 512 KiB
    plan = make_plan([random_indices((rows, cols), k)], (rows, cols), (cols, 1))
    left, right = torch.randn(16, rows), torch.randn(16, cols)
    kept = scratch_bytes()
    try:
        set_scratch_bytes(2**15)
        peak = allocator_peak(lambda: chunked(left, right, plan, torch.float32))
        # one piece beside its successor, the result, and places and values of a piece's entries
        assert peak < 3 * 2**15 + 6 * 4 * k
        set_scratch_bytes(2**20)
        assert allocator_peak(lambda: chunked(left, right, plan, torch.float32)) > rows * cols * 4
    finally:
        set_scratch_bytes(kept)
