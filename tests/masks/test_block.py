# SPDX-License-Identifier: Apache-2.0
"""Block masks: exactly k entries of whole blocks, one of them cut, chosen as they should be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.blocks import block_layout
from shira.errors import MaskError
from shira.masks import block, block_diagonal_support, block_support

shapes = st.lists(st.integers(1, 23), min_size=1, max_size=3).map(tuple)
sizes = st.sampled_from([1, 2, 3, 5, 8, 64])
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def matrix(shape):
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def check(support, shape, k, b):
    entries = support.indices.tolist()
    assert len(entries) == k
    assert entries == sorted(set(entries))
    assert not entries or 0 <= entries[0] <= entries[-1] < math.prod(shape)
    assert support.shape == tuple(shape)
    assert support.indices.dtype == torch.int32
    if k:
        layout = block_layout(support, (b,))
        assert layout is not None
        assert layout.nnz == k


@settings(deadline=None)
@given(shapes, st.floats(0, 1), sizes, st.integers())
def test_random_blocks(shape, share, b, seed):
    k = round(share * math.prod(shape))
    support = block_support(shape, k, seed=seed, name="w", block_size=b)
    check(support, shape, k, b)
    assert support == block_support(shape, k, seed=seed, name="w", block_size=b)


@settings(deadline=None)
@given(shapes, st.floats(0, 1), sizes)
def test_diagonal_blocks(shape, share, b):
    k = round(share * math.prod(shape))
    check(block_diagonal_support(shape, k, block_size=b), shape, k, b)


def dense_scores(weight, gradient, score, b):
    """Sum over each block, one by one."""
    values = {"magnitude": weight, "grad": gradient, "snip": weight.double() * gradient.double()}
    values = values[score].double().abs().view(matrix(weight.shape))
    rows, cols = values.shape
    return torch.tensor(
        [
            values[i : i + b, j : j + b].sum().item()
            for i in range(0, rows, b)
            for j in range(0, cols, b)
        ]
    )


@settings(deadline=None, max_examples=60)
@given(
    shapes,
    st.floats(0.01, 1),
    sizes,
    st.sampled_from(["magnitude", "grad", "snip"]),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.sampled_from([1, 100, 2**22]),
)
def test_blocks_of_the_largest_sums(shape, share, b, score, dtype, strided, at_a_time):
    k = max(1, round(share * math.prod(shape)))
    weight, gradient = torch.randint(-4, 5, (2, *shape)).to(dtype)  # sums are exact, ties are many
    if strided and len(shape) == 2:
        weight = weight.t().contiguous().t()
    kept, block.BLOCK = block.BLOCK, at_a_time
    try:
        support = block_support(
            shape, k, weight=weight, gradient=gradient, block_size=b, score=score
        )
    finally:
        block.BLOCK = kept
    check(support, shape, k, b)
    layout = block_layout(support, (b,))
    sums = dense_scores(weight, gradient, score, b)
    order = sums.argsort(descending=True, stable=True)[: len(layout)].tolist()
    ids = layout.ids().tolist()
    assert sorted(ids) == sorted(order)
    if layout.cut is not None:
        assert ids[-1] == order[-1]


def test_the_diagonal_of_a_square():
    support = block_diagonal_support((6, 6), 12, block_size=2)
    assert torch.equal(support.mask(), torch.block_diag(*[torch.ones(2, 2)] * 3).bool())
    # further diagonals below it, round the edge
    more = block_diagonal_support((6, 6), 24, block_size=2)
    assert block_layout(more, (2,)).ids().tolist() == [0, 2, 3, 4, 7, 8]
    assert block_diagonal_support((6, 6), 36, block_size=2).density == 1


@pytest.mark.parametrize("shape", [(4, 12), (12, 4)])
def test_the_diagonal_of_a_rectangle_is_diablos(shape):
    support = block_diagonal_support(shape, 24, block_size=2)
    part = torch.ones(2, 6) if shape == (4, 12) else torch.ones(6, 2)
    assert torch.equal(support.mask(), torch.block_diag(part, part).bool())


@pytest.mark.parametrize(("shape", "b"), [((32, 88), 8), ((88, 32), 8), ((30, 70), 8), ((9, 9), 2)])
def test_a_diagonal_covers_every_row_and_column(shape, b):
    down, across = (math.ceil(size / b) for size in shape)
    k = 0  # the entries of the first diagonal, cell by cell
    for step in range(max(down, across)):
        i = step * down // max(down, across)
        j = step * across // max(down, across)
        k += min(b, shape[0] - i * b) * min(b, shape[1] - j * b)
    mask = block_diagonal_support(shape, k, block_size=b).mask()
    assert mask.any(0).all()
    assert mask.any(1).all()


def test_a_part_of_a_diagonal_is_spread_evenly():
    support = block_diagonal_support((64, 64), 4 * 8, block_size=2)
    assert block_layout(support, (2,)).row_block.tolist() == [0, 4, 8, 12, 16, 20, 24, 28]


def test_the_same_on_every_platform_for_ever():
    got = block_support((6, 10), 11, seed=42, name="layers.0.w", block_size=2)
    assert got.indices.tolist() == [24, 25, 34, 35, 42, 43, 44, 45, 52, 54, 55]
    huge = block_support((2**20, 2**20), 1030, seed=-1, name="ß", block_size=32)
    assert huge.indices.tolist()[:3] == [285817697728, 285817697729, 285817697730]


@pytest.mark.parametrize(
    ("k", "b"), [(1, 8), (1023, 8), (1024, 16), (4096, 32), (16384, 64), (10**6, 64)]
)
def test_the_default_block_size(k, b):
    support = block_support((1024, 1024), k, seed=0)
    assert support == block_support((1024, 1024), k, seed=0, block_size=b)


@pytest.mark.parametrize(("k", "b"), [(1, 8), (20971, 16), (2 * 32 * 1024, 64), (5 * 10**5, 128)])
def test_the_default_block_size_of_a_diagonal(k, b):
    support = block_diagonal_support((1024, 512), k)
    assert support == block_diagonal_support((1024, 512), k, block_size=b)
    if k >= 8 * 1024:
        assert support.mask().any(0).all()
        assert support.mask().any(1).all()


def test_random_blocks_are_even_and_independent_of_name_and_seed():
    grid = (32, 40)
    shape, per_block = (grid[0] * 4, grid[1] * 4), 16
    chosen = 128
    masks = [
        block_support(shape, chosen * per_block, seed=seed, name=name, block_size=4)
        for seed, name in itertools.product(range(20), ("a", "b"))
    ]
    counts = np.zeros(grid[0] * grid[1])
    for mask in masks:
        counts[block_layout(mask, (4,)).ids().numpy()] += 1
    p, n = chosen / counts.size, len(masks)
    spread = ((counts - n * p) ** 2).sum() / (n * p * (1 - p))
    assert abs(spread - counts.size) < 5 * math.sqrt(2 * counts.size)
    shared = [a.overlap(b) / per_block for a, b in itertools.combinations(masks, 2)]
    expected = chosen * p
    assert abs(np.mean(shared) - expected) < 5 * math.sqrt(expected / len(shared))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: block_support((4, 4), 17, seed=0), "17 entries does not fit"),
        (lambda: block_support((4, 4), 3, seed=0, block_size=0), "block_size .* not 0"),
        (lambda: block_support((4, 4), 3, seed=0, block_size=2.0), "block_size .* not 2.0"),
        (lambda: block_support((4, 4), 3, seed=0, block_size=True), "block_size .* not True"),
        (lambda: block_support((4, 4), 3, score="gradient"), "Did you mean 'grad'"),
        (lambda: block_support((4, 4), 3), "need a seed"),
        (
            lambda: block_support((4, 4), 3, score="magnitude"),
            "needs the weight, but none was passed",
        ),
        (
            lambda: block_support((4, 4), 3, score="grad", gradient=torch.ones(4, 3)),
            r"gradient has shape \(4, 3\), the mask \(4, 4\)",
        ),
        (
            lambda: block_support((4, 4), 3, score="magnitude", weight=torch.ones(4, 4).long()),
            "floating",
        ),
        (
            lambda: block_support((4, 4), 3, score="magnitude", weight=torch.ones(4, 4).to("meta")),
            "meta",
        ),
        (lambda: block_diagonal_support((4, 4), -1), "not -1"),
        (lambda: block_diagonal_support((4, 4), 3, block_size=-2), "not -2"),
    ],
)
def test_mistakes(call, word):
    with pytest.raises(MaskError, match=word):
        call()


def test_nan_is_refused():
    weight = torch.ones(6, 6)
    weight[3, 4] = math.nan
    with pytest.raises(MaskError, match=r"block \(1, 2\) of 2 x 2"):
        block_support((6, 6), 3, score="magnitude", weight=weight, block_size=2)


def test_no_dense_temporary():
    """Scoring reads the weight band by band: the largest tensor alive is a band."""
    from benchmarks.memory import allocator_peak

    weight = torch.randn(2048, 512)
    kept, block.BLOCK = block.BLOCK, 2**16
    try:
        peak = allocator_peak(
            lambda: block_support((2048, 512), 5000, score="magnitude", weight=weight)
        )
    finally:
        block.BLOCK = kept
    assert peak < weight.numel() * 4 / 4
