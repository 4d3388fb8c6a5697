# SPDX-License-Identifier: Apache-2.0
"""The functions of methods, against the dense reference and PEFT's own; and the table of them.

A row is enough for a new method, and all that lists methods follows the table.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira import Adapter, SparseDelta, fuse
from shira.cli import fuse as command
from shira.fusing import METHODS, Method
from shira.fusing.methods import (
    digest,
    drop,
    elected_mean,
    mag_prune,
    row_rank,
    trim,
    uniform,
    weighted_sum,
)
from shira.support import align
from tests.adapters import SHAPES, delta, deltas, dtypes, few, finite, random_delta
from tests.fusing import reference

SHAPE = SHAPES["one.weight"]
several = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        dtypes.flatmap(lambda dtype: st.lists(deltas(SHAPE, dtype), min_size=n, max_size=n)),
        st.lists(finite, min_size=n, max_size=n),
    )
)


def wide(parts):
    """Dense, in the dtype in which sums are made."""
    dtype = torch.float64 if parts[0].values.dtype == torch.float64 else torch.float32
    return [reference.dense(part).to(dtype) for part in parts]


@few
@given(st.lists(deltas(SHAPE), min_size=1, max_size=5))
def test_align(parts):
    union, places = align([part.support for part in parts])
    assert set(union.indices.tolist()) == {i for p in parts for i in p.support.indices.tolist()}
    for part, place in zip(parts, places, strict=True):
        found = union.indices if place is None else union.indices[place]
        assert torch.equal(found, part.support.indices)


@few
@given(several)
def test_weighted_sum_is_the_dense_one_bit_for_bit(case):
    parts, weights = case
    fused = weighted_sum(parts, weights)
    assert torch.equal(reference.dense(fused), reference.weighted_sum(wide(parts), weights))


@few
@given(several, st.sampled_from(["total", "frequency"]))
def test_elected_mean_is_the_dense_one_bit_for_bit(case, vote):
    parts, weights = case
    fused = elected_mean(parts, weights, vote)
    assert torch.equal(reference.dense(fused), reference.elected_mean(wide(parts), weights, vote))


# Whole numbers have exact sums, in whatever order PEFT makes them.
whole = st.integers(-20, 20).map(float)
parts_of_whole_numbers = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 14), whole).map(lambda v: delta(SHAPE, v)), whole),
    min_size=1,
    max_size=5,
)


@few
@given(parts_of_whole_numbers, st.sampled_from(["total", "frequency"]))
def test_elected_mean_is_pefts(case, vote):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    parts, weights = zip(*case, strict=True)
    stacked = torch.stack(wide(parts))
    mask = merge_utils.calculate_majority_sign_mask(stacked, vote)
    expected = merge_utils.disjoint_merge(stacked * torch.tensor(weights).view(-1, 1, 1), mask)
    assert torch.equal(reference.dense(elected_mean(parts, weights, vote)), expected)


@few
@given(deltas(SHAPE), st.floats(0.01, 1.0))
def test_trim(part, density):
    kept = trim(part, density)
    count = int(density * part.nnz)
    assert kept.nnz == count
    dense = reference.trim(reference.dense(part), part.support.numel)
    if part.nnz == part.support.numel:  # the reference counts zeros that are not entries too
        dense = reference.trim(reference.dense(part), count)
        assert torch.equal(reference.dense(kept), dense)
    smallest = kept.values.abs().min() if count else math.inf
    left_out = set(part.support.indices.tolist()) - set(kept.support.indices.tolist())
    assert all(abs(float(reference.dense(part).view(-1)[i])) <= smallest for i in left_out)


def test_trim_takes_the_first_of_equal_ones():
    part = delta((2, 4), {0: 1.0, 2: -1.0, 5: 1.0, 7: 3.0})
    assert trim(part, 0.5).support.indices.tolist() == [0, 7]


def test_drop_keeps_the_mean_and_the_share():
    k = 40_000
    part = random_delta((400, 400), k, 1)
    draw = uniform(k, 7, "w", digest(part))
    kept = drop(part, 0.3, draw)
    assert abs(kept.nnz - 0.3 * k) < 5 * math.sqrt(k * 0.3 * 0.7)
    at = part.support.positions_of(kept.support)
    assert torch.equal(kept.values, part.values[at] / 0.3)


def test_mag_prune_keeps_large_ones_more_often():
    k = 80_000
    part = random_delta((400, 400), k, 1)
    rank = row_rank(part)
    kept = mag_prune(part, 0.5, 0.6, uniform(k, 7, "w", digest(part)))
    stays = torch.zeros(k, dtype=torch.bool)
    stays[part.support.positions_of(kept.support)] = True
    for low in (0.0, 0.25, 0.5, 0.75):
        here = (rank >= low) & (rank < low + 0.25)
        expected = 0.2 + 0.6 * rank[here].mean()
        share = stays[here].double().mean()
        assert abs(share - expected) < 5 * math.sqrt(0.25 / int(here.sum()))
    chance = 0.2 + 0.6 * rank[stays]
    torch.testing.assert_close(kept.values, part.values[stays] / chance.float())
    # divided by its own chance, the sum stays what it was, on average
    spread = (part.values.double() ** 2 * (1 / (0.2 + 0.6 * rank) - 1)).sum().sqrt()
    assert abs(kept.values.double().sum() - part.values.double().sum()) < 5 * spread


def test_row_rank_counts_within_rows():
    part = delta((3, 4), {0: 3.0, 1: -1.0, 3: 2.0, 9: 5.0})
    assert row_rank(part).tolist() == [1.0, 0.0, 0.5, 0.5]


def test_draws_belong_to_the_delta():
    part, other = random_delta((20, 20), 100, 1), random_delta((20, 20), 100, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = uniform(100, 5, "w", digest(part))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, uniform(100, 5, "w", digest(part)))
    for unlike in (
        uniform(100, 6, "w", digest(part)),
        uniform(100, 5, "v", digest(part)),
        uniform(100, 5, "w", digest(other)),
        uniform(100, 5, "w", digest(part), 1),
    ):
        assert not torch.equal(first, unlike)
    # the same for ever, on any platform
    assert uniform(2, 5, "w", b"x").tolist() == GOLDEN


GOLDEN = [0.8037604295076282, 0.9057777025745942]


def largest_of_all(deltas, weights, epsilon):
    """A method as somebody else would write it, with an option of `fuse`."""
    union, places = align([part.support for part in deltas])
    total = torch.full((union.nnz,), epsilon)
    for part, weight, place in zip(deltas, weights, places, strict=True):
        total[place] = torch.maximum(total[place], part.values * weight)
    return SparseDelta(union, total)


def test_a_row_makes_a_method(monkeypatch):
    monkeypatch.setitem(METHODS, "largest", Method(largest_of_all, density=0.9))
    a = Adapter({"w": delta((2, 3), {0: 1.0, 4: -5.0})})
    b = Adapter({"w": delta((2, 3), {0: 3.0, 5: 2.0})})
    fused = fuse([a, b], [1.0, 2.0], "largest", epsilon=0.125)
    assert fused["w"] == delta((2, 3), {0: 6.0, 4: 0.125, 5: 4.0})
    assert fused.metadata["fused"]["epsilon"] == 0.125


def test_options_are_those_that_the_functions_name():
    expected = {
        "sum": (),
        "mean": (),
        "ties": ("density", "majority_sign_method"),
        "dare": ("density", "seed"),
        "dare_ties": ("density", "seed", "majority_sign_method"),
        "della": ("density", "epsilon", "seed", "majority_sign_method"),
        "magnitude": ("density", "k"),
        "magnitude_prune": ("density",),
    }
    assert {name: METHODS[name].options for name in expected} == expected


def test_the_command_and_the_docstring_name_the_same_methods():
    listed = str(command.command.__annotations__["method"])
    names = re.search("(sum, .*) or (magnitude_prune)", listed)
    assert names is not None
    for name in [*names[1].split(", "), names[2]]:
        assert name in METHODS
        assert f"\n    {name}:" in command.command.__doc__ or f" {name}:" in command.command.__doc__
        assert f"``{name}``" in fuse.__doc__
