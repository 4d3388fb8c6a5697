# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.store.int8 import ERROR_BOUND, LARGEST_SCALE, dequantize, quantize

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def check(values: torch.Tensor) -> None:
    steps, scale = quantize(values)
    back = dequantize(steps, scale)
    assert steps.dtype == torch.int8
    assert back.dtype == torch.float32
    assert bool(torch.isfinite(back).all())
    assert not values.numel() or int(steps.min()) >= -127
    assert float(torch.tensor(scale, dtype=torch.float32)) == scale <= LARGEST_SCALE
    error = (back.double() - values.double()).abs()
    assert bool((error <= ERROR_BOUND * scale).all())
    assert bool((back[values == 0] == 0).all())


@settings(max_examples=300, deadline=None)
@given(st.lists(FLOATS, max_size=20))
def test_the_bound_holds(values: list[float]) -> None:
    check(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0, -0.0],
        [torch.finfo(torch.float32).max, 1.0, -torch.finfo(torch.float32).max],
        [math.ldexp(1.0, -149), -math.ldexp(1.0, -149)],
        [math.ldexp(1.0, -126), math.ldexp(1.0, -149), math.ldexp(127.0, -126)],
    ],
)
def test_the_extremes_of_float32(values: list[float]) -> None:
    check(torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    check(torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_the_bound_is_no_wider_than_half_a_step_needs() -> None:
    """Halves are met: a smaller bound would not hold."""
    values = torch.tensor([127.0, 0.5, 1.5, 2.5])
    steps, scale = quantize(values)
    assert (steps.tolist(), scale) == ([127, 0, 2, 2], 1.0)
    assert ERROR_BOUND < 0.50002
