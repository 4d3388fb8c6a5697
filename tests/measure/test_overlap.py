# SPDX-License-Identifier: Apache-2.0
"""`overlap`: figures by hand, by the dense reference, and by theory for random masks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira import Adapter, SparseDelta, Support, overlap
from shira.errors import AdapterError, WrongBaseError
from shira.measure import numerical_rank
from shira.measure.matrix import entries_of, largest_singular_value, zero_share
from tests.adapters import SHAPES, adapters, delta, few, random_adapter, random_delta
from tests.fusing.reference import dense


def matrix(part: SparseDelta) -> torch.Tensor:
    made = dense(part).double()
    return made.reshape(made.shape[0], -1)


def test_by_hand():
    a = Adapter({"w": delta((2, 4), {0: 1.0, 3: 2.0, 6: -1.0, 7: 0.0})})
    b = Adapter({"w": delta((2, 4), {3: -2.0, 6: -3.0, 7: 5.0}), "v": delta((2, 2), {0: 1.0})})
    found = overlap(a, b)
    w, v = found.parameters
    assert (w.nnz_a, w.nnz_b, w.shared, w.sign_conflicts) == (4, 3, 3, 1)
    assert w.jaccard == 3 / 4
    assert w.cosine == pytest.approx(-1 / math.sqrt(6 * 38))
    # A^T B by positions: row 0 gives (0, 3), (3, 3); row 1 gives {2, 3} x {2, 3}; 5 are distinct
    assert (w.awor.value, w.awor.error) == (1 - 5 / 16, 0)
    assert w.awom.value == pytest.approx(
        torch.linalg.matrix_norm(matrix(a["w"]).T @ matrix(b["w"]), 2).item()
    )
    assert (v.nnz_a, v.nnz_b, v.shared, v.cosine) == (0, 1, 0, 0.0)
    assert (v.awom.value, v.awor.value) == (0, 1)
    assert (found.nnz_a, found.nnz_b, found.shared, found.sign_conflicts) == (4, 4, 3, 1)
    assert found.jaccard == 3 / 5
    assert found.cosine == pytest.approx(-1 / math.sqrt(6 * 39))
    assert found.awom == w.awom
    assert found.awor.value == pytest.approx(1 - 5 / 20)


def test_singular_values_that_are_nearly_equal_are_told_apart():
    values = np.array([1.0, 1 - 6e-4, 0.3, 0.2])
    for seed in range(300):
        found = largest_singular_value(values.__mul__, values.__mul__, (4, 4), seed=seed)
        assert found.value == pytest.approx(1, rel=1e-9)


@few
@given(adapters(), adapters())
def test_the_dense_reference(a, b):
    found = overlap(a, b)
    assert [p.name for p in found.parameters] == list(dict.fromkeys((*a, *b)))
    for p in found.parameters:
        if p.name not in a or p.name not in b:
            assert p.shared == p.sign_conflicts == p.cosine == p.awom.value == 0
            continue
        one, other = a[p.name], b[p.name]
        x, y = matrix(one), matrix(other)
        here, there = one.support.mask(), other.support.mask()
        assert p.shared == int((here & there).sum())
        assert p.sign_conflicts == int((x * y < 0).sum())
        union = int((here | there).sum())
        assert p.jaccard == (p.shared / union if union else 0)
        norms = float(x.norm() * y.norm())
        assert p.cosine == pytest.approx(float((x * y).sum()) / norms if norms else 0, abs=1e-9)
        exact = torch.linalg.matrix_norm(x.T @ y, 2).item()
        assert p.awom.value == pytest.approx(exact, rel=1e-4, abs=1e-9)
        assert abs(p.awom.value - exact) <= p.awom.error + 1e-9 * (1 + exact)
        rows = here.reshape(x.shape).float(), there.reshape(x.shape).float()
        zeros = float(((rows[0].T @ rows[1]) == 0).double().mean())
        assert p.awor.value == pytest.approx(zeros)
        assert p.awor.error == 0


@few
@given(adapters(), adapters())
def test_symmetric_but_for_who_is_who(a, b):
    one, other = overlap(a, b), overlap(b, a)
    assert (one.shared, one.sign_conflicts) == (other.shared, other.sign_conflicts)
    assert one.cosine == pytest.approx(other.cosine)
    assert one.awor.value == pytest.approx(other.awor.value)
    assert one.awom.value == pytest.approx(other.awom.value, rel=1e-3)


@few
@given(adapters())
def test_with_itself(adapter):
    found = overlap(adapter, adapter)
    assert found.shared == adapter.nnz
    assert found.sign_conflicts == 0
    assert found.jaccard == (1 if adapter.nnz else 0)
    assert found.cosine == pytest.approx(1 if any(d.values.any() for d in adapter.values()) else 0)


@few
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4))
def test_disjoint_slots_overlap_exactly_nowhere(seed, k, slot, other):
    a = random_adapter(seed, k=k, slot=slot)
    b = random_adapter(seed, k=k, slot=other)
    found = overlap(a, b)
    if slot == other:
        assert found.shared == found.nnz_a
    else:
        assert (found.shared, found.sign_conflicts) == (0, 0)
        assert (found.jaccard, found.cosine, found.conflict_share) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("p", [0.005, 0.02])
def test_random_masks_agree_with_theory(p):
    """Shared p^2 of all entries, AWOR (1 - p^2)^n: each within five standard deviations.

    The spread of AWOR between draws is measured here, over independent masks.
    """
    shape, draws = (640, 512), 24
    k = int(p * math.prod(shape))
    p = k / math.prod(shape)
    shared, zeros = [], []
    for seed in range(draws):
        a = random_adapter(2 * seed, {"w": shape}, k=k)
        b = random_adapter(2 * seed + 1, {"w": shape}, k=k)
        found = overlap(a, b)
        shared.append(found.shared)
        zeros.append(found.awor.value)
        assert found.parameters[0].awor_of_random == pytest.approx((1 - p * p) ** shape[0])
    shared, zeros = torch.tensor(shared).double(), torch.tensor(zeros).double()
    expected = k * p  # hypergeometric
    variance = k * p * (1 - p) * (math.prod(shape) - k) / (math.prod(shape) - 1)
    assert abs(shared.mean() - expected) < 5 * math.sqrt(variance / draws)
    error = zeros.std() / math.sqrt(draws)
    assert abs(zeros.mean() - (1 - p * p) ** shape[0]) < 5 * error
    assert error < 1e-3  # so that the bound above means something


def test_sampled_awor_is_as_near_as_it_says():
    """Of 95 % intervals over 60 draws at least 48 hold the exact figure (fewer: P < 2e-5)."""
    shape = (300, 300)
    a, b = (entries_of(random_delta(shape, 2000, seed)) for seed in (1, 2))
    exact = zero_share(a, b, shape)
    assert exact.error == 0
    held = 0
    for seed in range(60):
        sampled = zero_share(a, b, shape, effort=1000, seed=seed)
        assert 0 < sampled.error < 0.05
        held += abs(sampled.value - exact.value) <= sampled.error
    assert held >= 48


def test_blocks_of_rows_make_no_difference(monkeypatch):
    shape = (50, 130)
    a, b = (entries_of(random_delta(shape, 500, seed)) for seed in (1, 2))
    whole = zero_share(a, b, shape)
    monkeypatch.setattr("shira.measure.matrix._MEMORY", 64 * 3 * 7 + 8 * 3 * 130)
    assert zero_share(a, b, shape) == whole


def test_all_shapes_of_masks():
    """A full row, a full column, the diagonal, everything, nothing."""
    n = 9
    masks = {
        "row": range(n),
        "column": range(0, n * n, n),
        "diagonal": range(0, n * n, n + 1),
        "all": range(n * n),
        "none": range(0),
    }
    parts = {key: delta((n, n), {i: 1.0 + i for i in at}) for key, at in masks.items()}
    for x in parts.values():
        for y in parts.values():
            found = overlap(Adapter({"w": x}), Adapter({"w": y}))
            product = matrix(x).T @ matrix(y)
            assert found.awor.value == pytest.approx(float((product == 0).double().mean()))
            assert found.awom.value == pytest.approx(
                torch.linalg.matrix_norm(product, 2).item(), rel=1e-4
            )


def test_without_interference():
    found = overlap(random_adapter(1), random_adapter(2), interference=False)
    assert found.awom is None
    assert found.awor is None
    assert found.as_json()["awor"] is None
    assert "-" in str(found)


def test_results_to_read_and_to_parse():
    seen = []
    found = overlap(
        random_adapter(1),
        random_adapter(2),
        names=("poems", "code"),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    made = json.loads(json.dumps(found.as_json()))
    assert (made["a"], made["b"], made["nnz_a"]) == ("poems", "code", 18)
    assert [p["name"] for p in made["parameters"]] == list(SHAPES)
    assert set(made["parameters"][0]["awom"]) == {"value", "error"}
    lines = str(found).splitlines()
    assert lines[:2] == ["a: poems", "b: code"]
    assert [line.split()[0] for line in lines[2:]] == ["parameter", "all", *SHAPES]


def test_no_global_generator_is_touched():
    state = torch.get_rng_state()
    one = overlap(random_adapter(1), random_adapter(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert overlap(random_adapter(1), random_adapter(2)) == one


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**130)])
def test_any_integer_is_a_seed(seed):
    one, other = random_adapter(1), random_adapter(2)
    found = overlap(one, other, seed=seed, effort=1)
    assert found == overlap(one, other, seed=seed, effort=1)
    assert numerical_rank(next(iter(one.values())), limit=1, seed=seed).rank


def test_refusals():
    a = random_adapter(1)
    with pytest.raises(AdapterError, match="not dict"):
        overlap(a, {})
    other = Adapter({"one.weight": SparseDelta(Support((5, 3), torch.tensor([0])), torch.ones(1))})
    with pytest.raises(AdapterError, match="different models"):
        overlap(a, other)
    bases = [Adapter(dict(a), {"base_model_name_or_path": name}) for name in ("x", "y")]
    with pytest.raises(WrongBaseError):
        overlap(*bases)
    assert overlap(*bases, check_base=False).shared == a.nnz
