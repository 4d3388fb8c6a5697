# SPDX-License-Identifier: Apache-2.0
"""A weight with adapters inside, against plain torch."""

from __future__ import annotations

import pytest
import torch

from shira import ops
from shira.masks import random_support


def case(shape, dtype, adapters=2):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    numel = weight.numel()
    supports = [random_support(shape, numel // 4, seed=seed) for seed in range(adapters)]
    deltas = [torch.randn(numel // 4, generator=generator).requires_grad_() for _ in supports]
    return weight, deltas, supports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (4, 3, 2, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "turned"])
def test_value_and_gradient(shape, dtype, layout):
    weight, deltas, supports = case(shape, dtype)
    if layout == "turned":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    weight.requires_grad_()
    before = weight.detach().clone()
    got = ops.adapted_weight(weight, deltas, [s.coordinates() for s in supports])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    total = torch.zeros(weight.numel())
    for support, delta in zip(supports, deltas, strict=True):
        total.index_add_(0, support.indices.long(), delta.detach())
    want = (weight.detach().to(wide) + total.view(shape).to(wide)).to(dtype)
    assert torch.equal(got, want)
    assert torch.equal(weight, before)
    assert got.data_ptr() != weight.data_ptr()
    grad = torch.randn(shape).to(dtype)
    got.backward(grad)
    assert torch.equal(weight.grad, grad)
    for support, delta in zip(supports, deltas, strict=True):
        assert torch.equal(delta.grad, grad.reshape(-1)[support.indices.long()].float())


def test_the_ops_rules():
    weight, deltas, supports = case((6, 8), torch.float32)
    indices = [support.coordinates() for support in supports]
    torch.library.opcheck(torch.ops.shira.adapted_weight, (weight, deltas, indices))
