# SPDX-License-Identifier: Apache-2.0
"""The numerical rank, and the largest singular value it stands on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given

from shira import SparseDelta, Support
from shira.measure import numerical_rank
from shira.measure.matrix import largest_singular_value
from tests.adapters import SHAPES, delta, deltas, few, random_delta
from tests.fusing.reference import dense


def of_matrix(matrix: torch.Tensor) -> SparseDelta:
    support = Support.from_mask(matrix != 0)
    return SparseDelta(support, matrix.reshape(-1)[support.indices.long()])


def low_rank(rows, cols, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows + cols, rank, generator=generator).double()
    return factors[:rows] @ factors[rows:].T


@few
@given(deltas(SHAPES["conv.weight"]))
def test_exact_rank_is_torchs(part):
    found = numerical_rank(part)
    whole = dense(part).double().reshape(2, -1)
    values = torch.linalg.svdvals(whole)
    expected = int((values > values.max() * found.tolerance).sum())
    assert found.rank == expected
    assert found.exact
    assert not found.at_least
    assert found.rank <= found.bound
    assert found.tolerance == 12 * torch.finfo(torch.float32).eps
    assert found.spectral_norm.value == pytest.approx(float(values.max()))


def test_the_bound_is_of_rows_and_columns_that_have_a_value():
    part = delta((6, 6), {0: 1.0, 1: 1.0, 2: 1.0, 12: 2.0, 35: 0.0})
    assert numerical_rank(part).bound == 2
    assert numerical_rank(part).rank == 2
    nothing = numerical_rank(delta((6, 6), {3: 0.0}))
    assert (nothing.rank, nothing.bound, nothing.stable_rank) == (0, 0, 0.0)


@pytest.mark.parametrize("shape", [(300, 90), (90, 300), (200, 200)])
@pytest.mark.parametrize("rank", [1, 20, 39])
def test_sketch_finds_a_rank_below_its_limit(shape, rank):
    part = of_matrix(low_rank(*shape, rank))
    found = numerical_rank(part, limit=40, tolerance=1e-9)
    assert (found.rank, found.exact, found.at_least) == (rank, False, False)
    values = torch.linalg.svdvals(dense(part))
    assert found.spectral_norm.value == pytest.approx(float(values[0]), rel=1e-6)
    assert found.stable_rank == pytest.approx(float((values / values[0]).square().sum()), rel=1e-3)
    assert str(found) == f"~ {rank} of at most {min(shape)}"


@pytest.mark.parametrize("shape", [(300, 90), (90, 300)])
def test_beyond_the_limit_the_rank_is_at_least_that(shape):
    part = random_delta(shape, 5000, 1)
    found = numerical_rank(part, limit=40)
    assert (found.rank, found.at_least, found.exact) == (40, True, False)
    assert str(found) == ">= 40 of at most 90"
    exact = numerical_rank(part)
    assert (exact.rank, exact.exact, exact.at_least) == (90, True, False)
    assert json.loads(json.dumps(exact.as_json()))["rank"] == 90


def test_a_thin_delta_of_full_rank_needs_no_more_than_a_sketch():
    """Few rows of a wide weight: the rank reaches its bound, and so is certain."""
    part = random_delta((8, 20_000), 4000, 1)
    found = numerical_rank(part, limit=16)
    assert (found.rank, found.bound, found.exact) == (8, 8, True)


def test_largest_singular_value_of_close_spectra():
    """Entries of a random matrix: the upper singular values lie close together."""
    matrix = np.random.default_rng(0).standard_normal((250, 200))
    exact = np.linalg.norm(matrix, 2)
    for tolerance in (1e-2, 1e-4, 1e-8):
        found = largest_singular_value(
            lambda v: matrix @ v, lambda u: matrix.T @ u, matrix.shape, tolerance=tolerance
        )
        assert found.value <= exact * (1 + 1e-12)
        assert found.error <= tolerance * exact
        assert exact - found.value <= found.error + 1e-9
    short = largest_singular_value(
        lambda v: matrix @ v, lambda u: matrix.T @ u, matrix.shape, steps=3, tolerance=0
    )
    assert 0 < exact - short.value < short.error


def test_largest_singular_value_of_one_direction_ends_by_itself():
    left, right = np.arange(1.0, 6.0), np.arange(1.0, 4.0)
    matrix = np.outer(left, right)
    found = largest_singular_value(lambda v: matrix @ v, lambda u: matrix.T @ u, matrix.shape)
    assert found.value == pytest.approx(np.linalg.norm(left) * np.linalg.norm(right))
    assert found.error == 0
    zero = largest_singular_value(lambda v: 0 * left, lambda u: 0 * right, matrix.shape)
    assert (zero.value, zero.error) == (0, 0)


def test_the_default_device_does_not_matter():
    part = random_delta((700, 900), 5000, 1)
    want = numerical_rank(part)
    with torch.device("meta"):
        assert numerical_rank(part) == want
    assert not want.exact  # from a sketch
