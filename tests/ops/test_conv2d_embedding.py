# SPDX-License-Identifier: Apache-2.0
"""`shira::conv2d` and `shira::embedding` against the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops
from shira.ops import reference

from .cases import close, random_indices, values

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("counts", [[0], [1], [17], [17, 30]])
def test_conv2d_equals_reference(dtype, groups, layout, counts):
    torch.manual_seed(0)
    shape = (4, 6 // groups, 3, 2)
    weight = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    before = weight.clone()
    x = torch.randn(2, 6, 7, 8).to(dtype).requires_grad_()
    bias = torch.randn(4).to(dtype).requires_grad_()
    deltas = [
        values(k, torch.float64 if dtype == torch.float64 else torch.float32, k) for k in counts
    ]
    indices = [random_indices(shape, k, k) for k in counts]
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": groups}
    y = ops.conv2d(x, weight, bias, deltas, indices, **geometry)
    want = reference.conv2d(x, weight, bias, deltas, indices, **geometry)
    grad = torch.randn(y.shape).to(dtype)
    got_grads = torch.autograd.grad(y, [x, bias, *deltas], grad)
    want_grads = torch.autograd.grad(want, [x, bias, *deltas], grad)
    assert torch.equal(weight, before)
    assert close(y, want, dtype)
    assert all(close(a, b, dtype) for a, b in zip(got_grads, want_grads, strict=True))


def test_conv2d_gradcheck_and_opcheck():
    weight = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    v, i = values(9, torch.float64), random_indices(weight.shape, 9)
    assert torch.autograd.gradcheck(lambda x, v: ops.conv2d(x, weight, None, [v], [i]), (x, v))
    torch.library.opcheck(
        torch.ops.shira.conv2d.default, (x, weight, None, [v], [i], [1, 1], [0, 0], [1, 1], 1)
    )


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 8),
    cols=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    shape=st.sampled_from([(), (0,), (4,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
    padded=st.booleans(),
)
def test_embedding_equals_reference(rows, cols, share, shape, dtype, padded):
    k = round(rows * cols * share)
    weight = torch.randn(rows, cols).to(dtype)
    before = weight.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    v, i = values(k, wide), random_indices((rows, cols), k)
    ids = torch.randint(rows, shape)
    padding = 0 if padded else None
    y = ops.embedding(ids, weight, [v], [i], padding_idx=padding)
    want = reference.embedding(ids, weight, [v], [i], -1 if padding is None else padding)
    assert torch.equal(y, want)
    assert torch.equal(weight, before)
    grad = torch.randn(y.shape).to(dtype)
    got = torch.autograd.grad(y, v, grad)[0]
    assert close(got, torch.autograd.grad(want, v, grad)[0], dtype)


def test_embedding_gradcheck_and_opcheck():
    weight = torch.randn(5, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 3], [4, 2, 0]])
    v, i = values(9, torch.float64), random_indices((5, 4), 9)
    assert torch.autograd.gradcheck(lambda v: ops.embedding(ids, weight, [v], [i]), (v,))
    torch.library.opcheck(torch.ops.shira.embedding.default, (ids, weight, None, [v], [i], -1))
