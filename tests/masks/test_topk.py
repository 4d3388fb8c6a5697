# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import MaskError
from shira.masks.topk import check_scored, row_blocks, top_k

scores = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, math.inf, -1.0, -math.inf]), min_size=1)


@settings(deadline=None)
@given(scores, st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_any_cut_into_blocks_gives_the_stable_order(values, data, dtype):
    k = data.draw(st.integers(1, len(values)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=5)))
    edges = [0, *cuts, len(values)]
    tensor = torch.tensor(values, dtype=dtype)
    blocks = [tensor[low:high] for low, high in itertools.pairwise(edges)]
    expected = sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])
    assert top_k(blocks, k).tolist() == expected


def test_nan_is_named_by_its_flat_index():
    blocks = [torch.zeros(5), torch.tensor([0.0, 1.0, math.nan, math.nan])]
    with pytest.raises(MaskError, match="flat entry 7 is not a number"):
        top_k(blocks, 2)


def test_too_few_entries():
    with pytest.raises(MaskError, match="3 entries cannot be chosen among 2"):
        top_k([torch.zeros(2)], 3)
    with pytest.raises(MaskError, match="among 0"):
        top_k([], 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4), st.integers(1, 40), st.randoms())
def test_row_blocks_are_small_and_in_logical_order(shape, size, rng):
    order = list(range(len(shape)))
    rng.shuffle(order)
    tensor = torch.arange(math.prod(shape)).view(shape).permute(order)
    blocks = list(row_blocks(tensor, size))
    assert all(block.dim() == 1 and 0 < block.numel() <= size for block in blocks)
    assert torch.equal(torch.cat(blocks), tensor.reshape(-1))


def test_contiguous_blocks_are_views():
    tensor = torch.zeros(6, 4)
    addresses = [block.data_ptr() for block in row_blocks(tensor, 8)]
    assert addresses == [tensor.data_ptr() + 32 * i for i in range(3)]


def test_what_cannot_be_scored():
    with pytest.raises(MaskError, match="the weight is a tensor, not list"):
        check_scored([1.0], "weight")
    with pytest.raises(MaskError, match=r"floating point numbers, not torch\.int8"):
        check_scored(torch.zeros(2, dtype=torch.int8), "weight")
    with pytest.raises(MaskError, match="gradient is on the meta device"):
        check_scored(torch.zeros(2, device="meta"), "gradient")
    weight = torch.nn.Parameter(torch.zeros(2))
    assert not check_scored(weight, "weight").requires_grad
