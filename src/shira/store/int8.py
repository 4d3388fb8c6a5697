# SPDX-License-Identifier: Apache-2.0
"""Values in one byte each, with one scale for each tensor.

``scale = max |v| / 127`` in float32, ``q = round(v / scale)`` (half to even), ``v' = q * scale`` in
float32. Every value is within ``ERROR_BOUND * scale`` of its own: half a step, and what rounding
the product to float32 adds. Used by ``compact_write`` and ``compact_read``.
"""

from __future__ import annotations

import torch
from torch import Tensor

ERROR_BOUND = 0.5 + 2.0**-16
"""Largest distance of a value from what it becomes, in steps of the scale."""

LARGEST_SCALE = float.fromhex("0x1.020406p+121")
"""127 steps of it are the largest that is still finite in float32."""

_LEAST_SCALE = 2.0**-126  # float32's least normal number: below it a scale would be imprecise


def quantize(values: Tensor) -> tuple[Tensor, float]:
    """Values as int8 and their scale.

    Args:
        values: ``(k,)`` floating point, finite in float32 too.

    Returns:
        int8 ``(k,)``, between -127 and 127, and the scale, a number that float32 can hold. The
        scale of no values, or of zeros alone, is 0.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest:
        return torch.zeros(values.numel(), dtype=torch.int8), 0.0
    step = min(max(largest / 127, _LEAST_SCALE), LARGEST_SCALE)
    scale = float(torch.tensor(step, dtype=torch.float32))
    steps = values.to(torch.float64, copy=True)
    return steps.div_(scale).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize(steps: Tensor, scale: float) -> Tensor:
    """The values: float32 ``(k,)``, ``steps * scale``."""
    return steps.to(torch.float32).mul_(scale)
