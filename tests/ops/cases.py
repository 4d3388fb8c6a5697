# SPDX-License-Identifier: Apache-2.0
"""Random operands for the tests of ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shira.support import Support


def random_indices(shape: Sequence[int], k: int, seed: int = 0) -> Tensor:
    """int32 (2, k) coordinates of k distinct entries."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(math.prod(shape), generator=generator)[:k]
    return Support.from_unsorted(shape, flat).coordinates()


def values(k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Relative to the size of the whole, as the error of a sum of products of numbers near 1 is."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}.get(dtype, 5e-3)
    wide_a, wide_b = a.double(), b.double()
    floor = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-30)  # terms that cancel
    return bool((wide_a - wide_b).norm() <= tolerance * wide_b.norm() + floor)
