# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import MaskError
from shira.masks.permutation import (
    ROUNDS,
    permute,
    permute_in_numpy,
    round_keys,
    sort_points,
)
from shira.ops import native

MASK64 = 2**64 - 1


def slow_permute(point: int, numel: int, keys: list[int]) -> int:
    """The definition, in unbounded python integers, one point at a time."""
    a = math.isqrt(numel)
    a += a * a < numel
    b = -(-numel // a)

    def hashed(value: int, key: int, size: int) -> int:
        mixed = ((value + key) * 0x9E3779B97F4A7C15) & MASK64
        mixed ^= mixed >> 32
        mixed = (mixed * 0xD1342543DE82EF95) & MASK64
        return ((mixed >> 32) * size) >> 32

    while True:
        left, right = divmod(point, b)
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + hashed(right, key, a)) % a
            else:
                right = (right + hashed(left, key, b)) % b
        point = left * b + right
        if point < numel:
            return point


@given(st.integers(1, 3000), st.integers(), st.text(), st.data())
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(numel, seed, name, data):
    start = data.draw(st.integers(0, numel - 1))
    count = data.draw(st.integers(0, min(50, numel - start)))
    keys = round_keys(seed, name)
    expected = [slow_permute(start + i, numel, keys.tolist()) for i in range(count)]
    assert permute(start, count, numel, keys).tolist() == expected


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 7, 9, 10, 16, 17, 99, 1000, 65536, 65537, 100003])
def test_the_whole_domain_is_permuted(numel):
    images = permute(0, numel, numel, round_keys(1, "w"))
    assert np.array_equal(np.sort(images), np.arange(numel))


def test_runs_are_pieces_of_one_permutation_across_chunks():
    keys = round_keys(5, "w")
    whole = permute(0, 100_000, 123_457, keys)
    pieces = [permute(start, 25_000, 123_457, keys) for start in range(0, 100_000, 25_000)]
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize(
    ("numel", "dtype"), [(2**31, np.int32), (2**31 + 1, np.int64), (2**62, np.int64)]
)
def test_huge_domains_cost_nothing(numel, dtype):
    images = permute(numel - 1000, 1000, numel, round_keys(0, "w"))
    assert images.dtype == dtype
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < numel
    # 1000 uniform points leave no half empty
    assert 350 < int((images < numel // 2).sum()) < 650
    assert images[0] == slow_permute(numel - 1000, numel, round_keys(0, "w").tolist())


def test_every_order_of_a_tiny_domain_turns_up():
    orders = Counter(tuple(permute(0, 4, 4, round_keys(seed, "")).tolist()) for seed in range(4800))
    assert set(orders) == set(itertools.permutations(range(4)))
    # 24 orders, 200 expected of each: chi-square with 23 degrees of freedom is below 58 in all but
    # 1 of 10 000 draws
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 58


def test_points_outside_the_domain_are_refused():
    keys = round_keys(0, "")
    for start, count, numel in [(0, 5, 4), (4, 1, 4), (-1, 2, 4), (0, -1, 4), (0, 1, 0)]:
        with pytest.raises(MaskError, match="points"):
            permute(start, count, numel, keys)
    with pytest.raises(MaskError, match=r"2\^62"):
        permute(0, 1, 2**62 + 1, keys)
    assert permute(0, 0, 0, keys).size == 0


def test_round_keys_are_the_same_for_ever():
    keys = round_keys(42, "model.layers.0.mlp.up_proj.weight")
    assert keys.dtype == np.uint64
    assert keys.shape == (ROUNDS,)
    assert [hex(key) for key in keys[:2].tolist()] == ["0x9a8b2e3e964f4c0a", "0xfd6c40520c0c5631"]


def test_round_keys_tell_seed_from_name():
    cases = [(1, "2"), (12, ""), (-12, ""), (0, "12"), (1, "\0" + "2"), (2**70, ""), (0, "\udc80")]
    assert len({tuple(round_keys(*case).tolist()) for case in cases}) == len(cases)


@pytest.mark.skipif(native.load().library is None, reason=native.load().why)
@settings(deadline=None)
@given(
    numel=st.one_of(st.integers(1, 5000), st.integers(2**31 - 3, 2**31 + 3), st.just(2**40 + 7)),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_compiled_and_numpy_agree(numel, seed, data):
    start = data.draw(st.integers(0, numel - 1))
    count = data.draw(st.integers(1, min(3000, numel - start)))
    keys = round_keys(seed, "name")
    a = math.isqrt(numel - 1) + 1
    want = permute_in_numpy(start, count, numel, (a, -(-numel // a)), keys)
    got = permute(start, count, numel, keys)
    assert got.dtype == want.dtype
    assert np.array_equal(got, want)
    for isa in ("base", "avx2"):
        words = torch.from_numpy(keys.view(np.int64).copy())
        kernels = native.kernels_for(isa)
        assert np.array_equal(
            kernels.permute(start, count, numel, (a, -(-numel // a)), words), want
        )


@settings(deadline=None)
@given(numel=st.integers(1, 20_000), data=st.data())
def test_sorted_points(numel, data):
    count = data.draw(st.integers(1, numel))
    points = permute(0, count, numel, round_keys(0, ""))
    want = np.sort(points)
    sort_points(points, numel)
    assert np.array_equal(points, want)
