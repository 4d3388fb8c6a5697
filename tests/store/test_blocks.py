# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.masks import block_diagonal_support, block_support, random_support, struct_support
from shira.store import blocks
from shira.support import Support


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
    down, across = blocks.grid(size, shape)
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
    assert blocks.entries_in(size, given_numbers, shape) == len(expected) - len(rest)
    out = np.empty(len(expected), np.int32)
    blocks.expand(blocks.Blocks(size, given_numbers, np.array(rest, np.int32)), shape, out)
    assert out.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(cases())
def test_what_is_found_is_exact(case) -> None:
    """Whatever blocks it finds, and it need not find any, they are the support again."""
    shape, size, numbers, rest = case
    flat = sorted(rest + [i for number in numbers for i in entries(shape, size, number)])
    indices = np.array(flat, np.int32)
    found = blocks.find_blocks(shape, indices)
    if found is not None:
        out = np.empty_like(indices)
        blocks.expand(found, shape, out)
        assert out.tolist() == flat
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
        found = blocks.find_blocks(shape, support.indices.numpy())
        assert found is not None
        # Or of half the size, where a cut block of the whole size would be a large rest.
        assert found.size in ((b, b), (b // 2, b // 2))
        assert len(found.rest) < b * b


def test_a_block_size_that_is_no_power_of_two() -> None:
    support = block_support((300, 210), 1100, seed=1, name="a", block_size=10)
    found = blocks.find_blocks(support.shape, support.indices.numpy())
    assert found is not None
    assert found.size == (10, 10)


def test_rows_of_a_struct_mask_are_blocks() -> None:
    support = struct_support((256, 512), 5000)
    found = blocks.find_blocks(support.shape, support.indices.numpy())
    assert found is not None
    assert found.size == (1, 512)
    assert len(found.numbers) == 9


def test_convolutions_count_as_matrices() -> None:
    support = block_support((32, 8, 3, 3), 4 * 64, seed=1, name="a", block_size=8)
    assert blocks.find_blocks(support.shape, support.indices.numpy()) is not None


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
    assert blocks.find_blocks(support.shape, support.indices.numpy()) is None


def test_a_whole_weight_is_one_block_or_a_few() -> None:
    found = blocks.find_blocks((64, 64), np.arange(64 * 64, dtype=np.int32))
    assert found is not None
    assert (found.size, len(found.numbers), len(found.rest)) == ((64, 64), 1, 0)
