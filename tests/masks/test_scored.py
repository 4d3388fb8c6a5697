# SPDX-License-Identifier: Apache-2.0
"""magnitude, grad and snip against a dense, stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import MaskError
from shira.masks import grad_support, magnitude_support, snip_support, topk

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def dense_reference(scores: torch.Tensor, k: int, largest: bool = True) -> list[int]:
    order = scores.reshape(-1).double().sort(descending=largest, stable=True).indices
    return sorted(order[:k].tolist())


@pytest.fixture(params=[4, 2**22], ids=["small-blocks", "one-block"], autouse=True)
def block_size(request, monkeypatch):
    """Each test runs with the weight in many pieces, and in one."""
    monkeypatch.setattr(topk.row_blocks, "__defaults__", (request.param,))


@st.composite
def tensors(draw, count=1):
    shape = draw(shapes)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    many_ties = draw(st.booleans())
    drawn = []
    for _ in range(count):
        tensor = torch.randn(shape, generator=generator)
        tensor = (tensor * 2).round() if many_ties else tensor
        drawn.append(tensor.to(draw(st.sampled_from(FLOATS))))
    return drawn, round(draw(st.floats(0, 1)) * math.prod(shape))


def check(support, tensor, k, expected):
    entries = support.indices.tolist()
    assert entries == expected
    assert len(entries) == len(set(entries)) == k
    assert support.shape == tuple(tensor.shape)


@settings(deadline=None)
@given(tensors(), st.booleans())
def test_magnitude(case, largest):
    (weight,), k = case
    support = magnitude_support(weight, k, largest=largest)
    check(support, weight, k, dense_reference(weight.abs(), k, largest))
    assert support == magnitude_support(weight, k, largest=largest)


@settings(deadline=None)
@given(tensors())
def test_grad(case):
    (gradient,), k = case
    check(grad_support(gradient, k), gradient, k, dense_reference(gradient.abs(), k))
    assert grad_support(gradient.abs(), k) == grad_support(gradient, k)


@settings(deadline=None)
@given(tensors(2))
def test_snip(case):
    (weight, gradient), k = case
    double = torch.float64 in (weight.dtype, gradient.dtype)
    wide = torch.float64 if double else torch.float32
    product = (weight.to(wide) * gradient.to(wide)).abs()
    check(snip_support(weight, gradient, k), weight, k, dense_reference(product, k))


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_do_not_matter(dtype):
    weight = torch.randn(13, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    for other in (weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, :17]):
        assert not other.is_contiguous()
        assert magnitude_support(other, 40) == magnitude_support(weight, 40)
        assert snip_support(other, weight, 40) == snip_support(weight, other, 40)
    assert magnitude_support(weight.t(), 40).indices.tolist() == dense_reference(
        weight.t().abs(), 40
    )


def test_of_equal_entries_the_first():
    weight = torch.tensor([[1.0, -2.0, 2.0], [-1.0, 2.0, 0.0]])
    assert magnitude_support(weight, 2).indices.tolist() == [1, 2]
    assert magnitude_support(weight, 4).indices.tolist() == [0, 1, 2, 4]
    assert magnitude_support(weight, 2, largest=False).indices.tolist() == [0, 5]
    assert grad_support(torch.zeros(2, 3), 2).indices.tolist() == [0, 1]
    assert snip_support(weight, torch.zeros(2, 3), 3).indices.tolist() == [0, 1, 2]


def test_snip_is_neither_magnitude_nor_grad():
    weight = torch.tensor([10.0, 1.0, 3.0, 0.0])
    gradient = torch.tensor([0.0, 2.0, 1.0, 10.0])
    assert magnitude_support(weight, 1).indices.tolist() == [0]
    assert grad_support(gradient, 1).indices.tolist() == [3]
    assert snip_support(weight, gradient, 1).indices.tolist() == [2]


def test_infinity_is_the_largest():
    weight = torch.tensor([1.0, -math.inf, 3.0, math.inf])
    assert magnitude_support(weight, 2).indices.tolist() == [1, 3]
    assert magnitude_support(weight, 2, largest=False).indices.tolist() == [0, 2]


@pytest.mark.parametrize("select", [magnitude_support, grad_support])
def test_nan_is_refused(select):
    bad = torch.ones(4, 3)
    bad[2, 1] = math.nan
    with pytest.raises(MaskError, match="flat entry 7 is not a number"):
        select(bad, 2)


def test_nan_of_a_product_is_refused():
    with pytest.raises(MaskError, match="flat entry 1 is not a number"):
        snip_support(torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.inf]), 1)


def test_mistakes():
    weight = torch.ones(3, 4)
    for select in (magnitude_support, grad_support):
        with pytest.raises(MaskError, match=r"13 entries does not fit .* \(3, 4\), which has 12"):
            select(weight, 13)
    with pytest.raises(MaskError, match="does not fit"):
        snip_support(weight, weight, 13)
    with pytest.raises(MaskError, match=r"gradient has shape \(4, 3\), the mask \(3, 4\)"):
        snip_support(weight, weight.t(), 2)
    with pytest.raises(MaskError, match="weight is on the meta device"):
        magnitude_support(weight.to("meta"), 2)
    with pytest.raises(MaskError, match="gradient holds floating point"):
        grad_support(weight.long(), 2)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
def test_no_budget_takes_nothing(shape):
    weight = torch.ones(shape)
    for support in (
        magnitude_support(weight, 0),
        grad_support(weight, 0),
        snip_support(weight, weight, 0),
    ):
        assert support.nnz == 0
        assert support.shape == shape


def test_parameters_are_read_and_left_alone():
    weight = torch.nn.Parameter(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    support = snip_support(weight, weight, 7)
    assert not support.indices.requires_grad
    assert torch.equal(weight, before)
    assert weight.grad is None


@pytest.mark.gpu
def test_the_gpu_agrees():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(200, 300, generator=generator) * 3).round().bfloat16()
    gradient = torch.randn(200, 300, generator=generator)
    there = weight.cuda()
    for largest in (True, False):
        support = magnitude_support(there, 999, largest=largest)
        assert support.indices.is_cuda
        assert support.to("cpu") == magnitude_support(weight, 999, largest=largest)
    assert snip_support(there, gradient, 999).to("cpu") == snip_support(weight, gradient, 999)
