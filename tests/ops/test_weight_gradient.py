# SPDX-License-Identifier: Apache-2.0
"""Both ways to the weight gradient against the dense product, and how one is chosen."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.ops import choose, make_plan, reference, weight_gradient
from shira.ops.weight_gradient import chunked, sampled

from .cases import close, random_indices

module = sys.modules["shira.ops.weight_gradient"]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    tokens=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    scratch=st.sampled_from([1, 200, 2**20]),
    at_a_time=st.sampled_from([1, 2, 256]),
)
def test_both_ways_equal_the_dense_product(
    rows, cols, tokens, share, dtype, strided, scratch, at_a_time
):
    k = round(rows * cols * share)
    indices = random_indices((rows, cols), k)
    plan = make_plan([indices], (rows, cols), (cols, 1))
    left = torch.randn(rows, tokens).t() if strided else torch.randn(tokens, rows)
    left, right = left.to(dtype), torch.randn(tokens, cols).to(dtype)
    flat = indices[0].long() * cols + indices[1].long()
    want = reference.weight_gradient(left, right, flat)
    wide = want.dtype
    kept = module.SCRATCH_BYTES, module._TOKENS_AT_A_TIME
    module.SCRATCH_BYTES, module._TOKENS_AT_A_TIME = scratch, at_a_time
    try:
        for way in (sampled, chunked) if k else (chunked,):
            got = way(left, right, plan, wide)
            assert got.shape == (k,)
            assert got.dtype == wide
            assert close(got, want, wide)
        assert close(weight_gradient(left, right, plan), want, wide)
    finally:
        module.SCRATCH_BYTES, module._TOKENS_AT_A_TIME = kept


def test_no_tokens_no_gradient():
    plan = make_plan([random_indices((4, 5), 6)], (4, 5), (5, 1))
    got = weight_gradient(torch.randn(0, 4), torch.randn(0, 5), plan)
    assert torch.equal(got, torch.zeros(6))


@pytest.mark.parametrize(
    ("device", "density", "name", "word"),
    [
        ("cpu", 0.02, "sampled", "0.02"),
        ("cpu", 0.5, "chunked", "0.5"),
        ("cuda", 0.02, "chunked", "cuda"),
    ],
)
def test_the_choice_says_why(device, density, name, word):
    choice = choose(device, torch.float32, density)
    assert choice.name == name
    assert word in choice.why
