# SPDX-License-Identifier: Apache-2.0
"""Blocks to entries and back, against dense masks; what is not made of blocks is turned away."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.blocks import (
    CANDIDATES,
    Blocks,
    block_layout,
    entries_of,
    expand,
    find_blocks,
    grid,
    support_of_blocks,
)
from shira.errors import SupportError
from shira.masks import (
    block_diagonal_support,
    block_support,
    random_support,
    struct_support,
)
from shira.support import Support


def dense(shape, b, ids, cut):
    """The support of some blocks, by filling a dense mask."""
    rows, cols = shape[0], math.prod(shape[1:])
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    across = math.ceil(cols / b)
    for number, block in enumerate(ids):
        part = mask[block // across * b :, block % across * b :][:b, :b]
        part[:] = True
        if cut is not None and number == len(ids) - 1:
            flat = torch.arange(part.numel()).view(part.shape) < cut
            part.copy_(flat)
    return Support.from_mask(mask.view(shape))


@st.composite
def blocks(draw):
    b = draw(st.sampled_from([1, 2, 3, 4, 8]))
    shape = draw(st.sampled_from([(7, 9), (8, 8), (16, 24), (1, 20), (20, 1), (6, 5, 3), (40, 33)]))
    rows, cols = shape[0], math.prod(shape[1:])
    across = math.ceil(cols / b)
    grid = math.ceil(rows / b) * across
    ids = draw(st.lists(st.integers(0, grid - 1), min_size=1, max_size=12, unique=True))
    last = ids[-1]
    size = min(b, rows - last // across * b) * min(b, cols - last % across * b)
    cut = draw(st.integers(1, size - 1)) if size > 1 and draw(st.booleans()) else None
    return shape, b, ids, cut


@settings(deadline=None, max_examples=200)
@given(blocks())
def test_there_and_back(case):
    shape, b, ids, cut = case
    support = support_of_blocks(shape, b, torch.tensor(ids), cut)
    assert support == dense(shape, b, ids, cut)
    assert support.shape == shape
    layout = block_layout(support, (b,))
    assert layout is not None
    assert layout.block_size == b
    assert layout.cut == cut
    assert layout.nnz == support.nnz
    whole = ids if cut is None else ids[:-1]
    assert layout.ids().tolist() == sorted(whole) + ids[len(whole) :]
    assert len(layout) == len(ids)
    assert support_of_blocks(shape, b, layout.ids(), layout.cut) == support
    # positions: a (blocks, b, b) tensor cut out of the weight holds the values at the support
    rows, cols = layout.shape
    weight = torch.randn(math.ceil(rows / b) * b, math.ceil(cols / b) * b)
    pieces = torch.stack(
        [
            weight[i * b : i * b + b, j * b : j * b + b]
            for i, j in zip(layout.row_block.tolist(), layout.col_block.tolist(), strict=True)
        ]
    )
    values = weight[:rows, :cols].reshape(-1)[support.indices.long()]
    assert torch.equal(pieces.view(-1)[layout.positions(support)], values)
    assert layout.regular == all(
        (i + 1) * b <= rows and (j + 1) * b <= cols
        for i, j in zip(layout.row_block.tolist(), layout.col_block.tolist(), strict=True)
    )


@settings(deadline=None, max_examples=200)
@given(blocks(), st.integers(0, 2**31), st.sampled_from(["drop", "add", "move"]))
def test_whatever_is_recognised_is_what_it_says(case, seed, change):
    """One entry changed: most are no blocks any more, and those that are must come out right."""
    shape, b, ids, cut = case
    entries = set(support_of_blocks(shape, b, torch.tensor(ids), cut).indices.tolist())
    generator = torch.Generator().manual_seed(seed)
    if change != "add":
        entries.discard(sorted(entries)[int(torch.randint(len(entries), (), generator=generator))])
    if change != "drop":
        entries.add(int(torch.randint(math.prod(shape), (), generator=generator)))
    support = Support(shape, torch.tensor(sorted(entries), dtype=torch.int64))
    layout = block_layout(support, (b,))
    if layout is not None:
        assert support_of_blocks(shape, b, layout.ids(), layout.cut) == support
    else:  # then no one set of blocks with one cut block gives it
        rows, cols = support.shape[0], math.prod(shape[1:])
        counts: dict[int, int] = {}
        prefix = True
        for flat in sorted(entries):
            i, j = flat // cols, flat % cols
            block = i // b * math.ceil(cols / b) + j // b
            width = min(b, cols - j // b * b)
            prefix &= i % b * width + j % b == counts.get(block, 0)
            counts[block] = counts.get(block, 0) + 1
        across = math.ceil(cols / b)
        short = [
            n < min(b, rows - block // across * b) * min(b, cols - block % across * b)
            for block, n in counts.items()
        ]
        assert not entries or not prefix or sum(short) > 1


def test_the_largest_candidate_that_fits():
    ids = torch.tensor([0, 5, 9])
    assert block_layout(support_of_blocks((256, 256), 64, ids)).block_size == 64
    assert block_layout(support_of_blocks((256, 256), 64, ids, cut=1000)).block_size == 64
    assert block_layout(support_of_blocks((256, 256), 64, ids), (32, 16)).block_size == 32
    assert len(block_layout(support_of_blocks((256, 256), 64, ids), (32,))) == 12
    assert block_layout(support_of_blocks((256, 256), 64, ids, cut=1000), (32,)) is None
    assert block_layout(support_of_blocks((256, 256), 48, ids)).block_size == 16
    assert tuple(sorted(CANDIDATES, reverse=True)) == CANDIDATES


@pytest.mark.parametrize("density", [0.001, 0.02, 0.5])
def test_unstructured_supports_are_turned_away(density):
    k = round(density * 256 * 320)
    assert block_layout(random_support((256, 320), k, seed=0)) is None
    assert block_layout(struct_support((256, 320), k)) is None
    assert block_layout(Support((256, 320), torch.empty(0, dtype=torch.int64))) is None


def test_a_full_weight_is_blocks():
    layout = block_layout(Support((64, 96), torch.arange(64 * 96)), (32,))
    assert layout.ids().tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.regular
    assert layout.cut is None


def test_mistakes():
    ids = torch.tensor([0, 3])
    with pytest.raises(SupportError, match=r"\[0, 4\)"):
        support_of_blocks((4, 4), 2, torch.tensor([4]))
    with pytest.raises(SupportError, match="twice"):
        support_of_blocks((4, 4), 2, torch.tensor([1, 1]))
    with pytest.raises(SupportError, match="at least 1"):
        support_of_blocks((4, 4), 0, ids)
    for cut in (0, 4):
        with pytest.raises(SupportError, match=f"leaves 1 to 3 of them, not {cut}"):
            support_of_blocks((4, 4), 2, ids, cut)
    assert support_of_blocks((4, 4), 2, torch.empty(0, dtype=torch.int64)).nnz == 0


# Blocks of any size, and the entries beside them: as files keep them


def entries(shape: tuple[int, int], size: tuple[int, int], number: int) -> list[int]:
    """The specification: flat indices of one block."""
    across = -(-shape[1] // size[1])
    top, left = number // across * size[0], number % across * size[1]
    return [
        row * shape[1] + col
        for row in range(top, min(top + size[0], shape[0]))
        for col in range(left, min(left + size[1], shape[1]))
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int], list[int], list[int]]:
    """A shape, a block size, some blocks and some entries outside of them."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    down, across = grid(size, shape)
    numbers = sorted(draw(st.sets(st.integers(0, down * across - 1), max_size=12)))
    inside = {i for number in numbers for i in entries(shape, size, number)}
    outside = sorted(set(range(shape[0] * shape[1])) - inside)
    rest = draw(st.sets(st.sampled_from(outside), max_size=8)) if outside else set()
    return shape, size, numbers, sorted(rest)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_expand_is_the_specification(case) -> None:
    shape, size, numbers, rest = case
    expected = sorted(rest + [i for number in numbers for i in entries(shape, size, number)])
    given_numbers = np.array(numbers, np.int64)
    assert entries_of(size, given_numbers, shape).sum() == len(expected) - len(rest)
    out = expand(Blocks(size, given_numbers, np.array(rest, np.int32)), shape)
    assert out.dtype == np.int32
    assert out.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(cases())
def test_what_is_found_is_exact(case) -> None:
    """Whatever blocks it finds, and it need not find any, they are the support again."""
    shape, size, numbers, rest = case
    flat = sorted(rest + [i for number in numbers for i in entries(shape, size, number)])
    indices = np.array(flat, np.int32)
    found = find_blocks(shape, indices)
    if found is not None:
        assert expand(found, shape).tolist() == flat
        assert len(found.numbers) + 2 * len(found.rest) < len(flat) / 2


@pytest.mark.parametrize("b", [8, 16, 32, 64])
@pytest.mark.parametrize("shape", [(256, 192), (250, 201)])
def test_block_masks_are_found(b: int, shape: tuple[int, int]) -> None:
    k = 10 * b * b // 2 + 3
    if k > shape[0] * shape[1]:
        k = 2 * b * b + 3
    for support in (
        block_support(shape, k, seed=1, name="a", block_size=b),
        block_diagonal_support(shape, k, block_size=b),
    ):
        found = find_blocks(shape, support.indices.numpy())
        assert found is not None
        # Or of half the size, where a cut block of the whole size would be a large rest.
        assert found.size in ((b, b), (b // 2, b // 2))
        assert len(found.rest) < b * b


def test_a_block_size_that_is_no_power_of_two() -> None:
    support = block_support((300, 210), 1100, seed=1, name="a", block_size=10)
    found = find_blocks(support.shape, support.indices.numpy())
    assert found is not None
    assert found.size == (10, 10)


def test_rows_of_a_struct_mask_are_blocks() -> None:
    support = struct_support((256, 512), 5000)
    found = find_blocks(support.shape, support.indices.numpy())
    assert found is not None
    assert found.size == (1, 512)
    assert len(found.numbers) == 9


def test_convolutions_count_as_matrices() -> None:
    support = block_support((32, 8, 3, 3), 4 * 64, seed=1, name="a", block_size=8)
    assert find_blocks(support.shape, support.indices.numpy()) is not None


@pytest.mark.parametrize(
    "support",
    [
        random_support((64, 64), 300, seed=1),
        random_support((64, 64), 2048, seed=1),
        Support.from_mask(random_support((4, 4), 0, seed=1).mask()),
        random_support((0, 4), 0, seed=1),
    ],
)
def test_others_are_not(support: Support) -> None:
    assert find_blocks(support.shape, support.indices.numpy()) is None


def test_a_whole_weight_is_one_block_or_a_few() -> None:
    found = find_blocks((64, 64), np.arange(64 * 64, dtype=np.int32))
    assert found is not None
    assert (found.size, len(found.numbers), len(found.rest)) == ((64, 64), 1, 0)


def test_an_unstructured_support_costs_one_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise AssertionError("its runs were listed")

    monkeypatch.setattr("shira.blocks._runs", fail)
    support = random_support((256, 256), 6000, seed=1)
    assert find_blocks(support.shape, support.indices.numpy()) is None
