# SPDX-License-Identifier: Apache-2.0
"""The random mask. Statistical bounds are five standard deviations or more; seeds are fixed."""

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
from shira.masks import random_support
from shira.masks.random import (
    ROUNDS,
    permute,
    permute_in_numpy,
    round_keys,
    sort_points,
)
from shira.ops import native

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


@settings(deadline=None)
@given(shapes, st.floats(0, 1), st.integers(), st.text(max_size=8))
def test_exactly_k_sorted_unique_in_range_and_deterministic(shape, share, seed, name):
    numel = math.prod(shape)
    k = round(share * numel)
    support = random_support(shape, k, seed=seed, name=name)
    entries = support.indices.tolist()
    assert len(entries) == k
    assert entries == sorted(set(entries))
    assert not entries or 0 <= entries[0] <= entries[-1] < numel
    assert support.shape == shape
    assert support == random_support(shape, k, seed=seed, name=name)


GOLDEN = [
    ((4, 5), 6, 0, "", 0, [0, 4, 7, 14, 16, 18]),
    ((4, 5), 6, 0, "", 1, [2, 8, 9, 11, 15, 17]),
    (
        (64, 48),
        8,
        42,
        "model.layers.0.self_attn.q_proj.weight",
        0,
        [131, 297, 298, 914, 1390, 1803, 2541, 2553],
    ),
    ((2**20, 2**20), 4, -1, "ß", 3, [158946169168, 623161129489, 1030205725082, 1093532904103]),
]


@pytest.mark.parametrize(("shape", "k", "seed", "name", "slot", "expected"), GOLDEN)
def test_the_same_on_every_platform_for_ever(shape, k, seed, name, slot, expected):
    assert random_support(shape, k, seed=seed, name=name, slot=slot).indices.tolist() == expected


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    first = random_support((30, 30), 90, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(1)
    assert random_support((30, 30), 90, seed=1) == first


@pytest.mark.parametrize("numel", [1, 2, 3, 10])
def test_a_full_budget_takes_everything(numel):
    support = random_support((numel,), numel, seed=0)
    assert support.indices.tolist() == list(range(numel))


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (0,)])
def test_no_budget_takes_nothing(shape):
    support = random_support(shape, 0, seed=0, slot=5)
    assert support.nnz == 0
    assert support.indices.dtype == torch.int32


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Standard deviations from what chi-square should be."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("shape", [(512, 768), (1000, 37), (2048, 512)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_columns_and_residues_are_hit_evenly(shape, seed):
    rows, cols = shape
    k = rows * cols // 10
    support = random_support(shape, k, seed=seed, name="w")
    row, col = support.coordinates().numpy()
    # Drawn without replacement: (1 - density) of the variance.
    for line, size in ((row, rows), (col, cols)):
        counts = np.bincount(line, minlength=size)
        spread = ((counts - k / size) ** 2).sum() / (k / size) / 0.9
        assert abs(spread - (size - 1)) < 5 * math.sqrt(2 * (size - 1))
    for modulus in (2, 7, 64, math.isqrt(rows * cols - 1) + 1):
        counts = np.bincount(support.indices.numpy() % modulus, minlength=modulus)
        spread = ((counts - k / modulus) ** 2).sum() / (k / modulus) / 0.9
        assert abs(spread - (modulus - 1)) < 5 * math.sqrt(2 * (modulus - 1)) + 1


def test_gaps_between_entries_are_geometric():
    shape, density = (2000, 1500), 0.02
    support = random_support(shape, int(3_000_000 * density), seed=3)
    gaps = np.diff(support.indices.numpy())
    counts = np.bincount(np.minimum(gaps, 200), minlength=201)[1:]
    chance = density * (1 - density) ** np.arange(200)
    chance[-1] = 1 - chance[:-1].sum()
    expected = chance * gaps.size
    spread = ((counts - expected) ** 2 / expected).sum()
    assert abs(spread - 199) < 5 * math.sqrt(2 * 199)


def test_every_entry_and_every_pair_of_a_small_weight_is_equally_likely():
    draws, n, k = 8000, 10, 3
    masks = [tuple(random_support((2, 5), k, seed=s).indices.tolist()) for s in range(draws)]
    subsets = Counter(masks)
    counts = np.array([subsets[c] for c in itertools.combinations(range(n), k)])
    assert counts.sum() == draws
    assert chi_square(counts, draws / math.comb(n, k)) < 5
    single = np.bincount(np.array(masks).ravel(), minlength=n)
    assert chi_square(single, draws * k / n) < 5


def overlap_in_deviations(a, b) -> float:
    """How far the overlap of two masks of one shape is from that of independent ones."""
    p, n = a.density, a.numel
    mean = p * p * n
    return (a.overlap(b) - mean) / math.sqrt(mean * (1 - p) ** 2)  # hypergeometric


@pytest.mark.parametrize("shape", [(300, 400), (640, 640)])
def test_masks_of_other_seeds_and_names_are_independent(shape):
    k = shape[0] * shape[1] // 20
    keys = [
        (0, "a"),
        (1, "a"),
        (2, "a"),
        (0, "b"),
        (0, "layers.0.w"),
        (0, "layers.1.w"),
        (2**40, ""),
    ]
    masks = [random_support(shape, k, seed=seed, name=name) for seed, name in keys]
    for a, b in itertools.combinations(masks, 2):
        assert abs(overlap_in_deviations(a, b)) < 5


def test_overlaps_of_many_pairs_spread_as_they_should():
    masks = [random_support((100, 120), 600, seed=0, name=f"layers.{i}.w") for i in range(40)]
    away = np.array([overlap_in_deviations(a, b) for a, b in itertools.combinations(masks, 2)])
    assert abs(away.mean()) < 5 / math.sqrt(away.size)
    assert 0.85 < away.std() < 1.15


@given(st.integers(1, 400), st.integers(1, 60), st.integers())
@settings(max_examples=50, deadline=None)
def test_slots_never_overlap_and_fill_the_weight(numel, k, seed):
    k = min(k, numel)
    fit = numel // k
    taken = [random_support((numel,), k, seed=seed, slot=i).indices.tolist() for i in range(fit)]
    together = [entry for entries in taken for entry in entries]
    assert len(together) == len(set(together)) == fit * k
    with pytest.raises(MaskError, match=f"room for {fit} disjoint slots, 0 to {fit - 1}"):
        random_support((numel,), k, seed=seed, slot=fit)


def test_slots_of_another_seed_are_independent():
    a = random_support((300, 400), 6000, seed=0, slot=3)
    b = random_support((300, 400), 6000, seed=1, slot=4)
    assert abs(overlap_in_deviations(a, b)) < 5


@pytest.mark.parametrize(
    ("k", "slot", "message"),
    [
        (13, 0, r"13 entries does not fit .* \(3, 4\), which has 12"),
        (-1, 0, "not -1"),
        (2, -1, "no slot -1"),
        (5, 2, "slot 2 of 5 entries"),
    ],
)
def test_what_does_not_fit_is_refused(k, slot, message):
    with pytest.raises(MaskError, match=message):
        random_support((3, 4), k, seed=0, slot=slot)


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
