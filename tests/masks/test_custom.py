# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import MaskError
from shira.masks import custom_support
from shira.support import Support

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64]
WHAT = "mask_fn for layer model.fc1"


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_a_dense_mask_or_a_support(shape, dtype, data):
    entries = sorted(data.draw(st.sets(st.integers(0, math.prod(shape) - 1))))
    mask = torch.zeros(math.prod(shape), dtype=dtype)
    mask[entries] = 1
    support = custom_support(mask.view(shape), shape, len(entries), what=WHAT)
    assert support.indices.tolist() == entries
    assert support.shape == shape
    assert custom_support(support, list(shape), len(entries), what=WHAT) is support


def test_a_mask_that_requires_grad_or_is_transposed():
    mask = torch.zeros(4, 3)
    mask[1, 2] = mask[3, 0] = 1
    expected = Support((3, 4), torch.tensor([3, 9]))
    assert custom_support(mask.t(), (3, 4), 2, what=WHAT) == expected
    assert custom_support(mask.t().requires_grad_(), (3, 4), 2, what=WHAT) == expected


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "returned NoneType; it returns a 0/1 tensor of the weight's shape"),
        ([[1]], "returned list"),
        (torch.ones(4, 3), r"shape \(4, 3\) \(it is transposed\), but .* shape \(3, 4\)"),
        (torch.ones(12), r"shape \(12,\), but the weight is stored with shape \(3, 4\)"),
        (Support((4, 3), torch.tensor([1, 2])), r"shape \(4, 3\) \(it is transposed\)"),
        (torch.ones(3, 4), "12 ones, but the budget is 2"),
        (Support((3, 4), torch.tensor([1])), "1 ones, but the budget is 2"),
        (torch.full((3, 4), 0.5), "returned no mask: .* zeros and ones"),
        (torch.full((3, 4), math.nan), "zeros and ones"),
        (torch.ones(3, 4, device="meta"), "on the meta device"),
        (torch.eye(3, 4).to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(mask, message):
    with pytest.raises(MaskError, match=message) as caught:
        custom_support(mask, (3, 4), 2, what=WHAT)
    assert str(caught.value).startswith(WHAT)


def test_a_budget_that_does_not_fit():
    with pytest.raises(MaskError, match="does not fit"):
        custom_support(torch.ones(3, 4), (3, 4), 13, what=WHAT)
