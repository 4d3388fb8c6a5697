# SPDX-License-Identifier: Apache-2.0
"""`fuse`: its promises, the record it leaves, what it refuses; and `fill_to_rank`."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira import Adapter, SparseDelta, Support, fuse
from shira.errors import AdapterError, ConfigError, WrongBaseError
from shira.fusing import METHODS, fill_to_rank
from tests.adapters import adapters, delta, few, finite, random_adapter
from tests.fusing import reference

methods = st.sampled_from(sorted(METHODS))


def same(a: Adapter, b: Adapter) -> bool:
    """Equal bit for bit, the sign of zeros included."""
    return a == b and all(
        torch.equal(a[name].values.signbit(), b[name].values.signbit()) for name in a
    )


def close(a: Adapter, b: Adapter) -> None:
    """Equal positions; values equal to rounding of what was summed."""
    assert set(a) == set(b)
    for name in a:
        assert a[name].support == b[name].support
        torch.testing.assert_close(a[name].values, b[name].values, rtol=1e-5, atol=1e-2)


@few
@given(adapters(), methods)
def test_one_adapter_at_weight_one_is_unchanged(adapter, method):
    assert same(fuse([adapter], method=method), adapter)
    assert same(fuse([adapter], [1], method), adapter)


def test_one_adapter_and_a_density_that_has_no_effect():
    adapter = random_adapter(1)
    with pytest.warns(UserWarning, match=r"unchanged and density=0\.5 has no effect"):
        assert fuse([adapter], method="dare", density=0.5) is adapter


@few
@given(st.lists(adapters(), min_size=2, max_size=4), methods, st.data())
def test_commutative_bit_for_bit(parts, method, data):
    weights = data.draw(st.lists(finite.filter(bool), min_size=len(parts), max_size=len(parts)))
    if abs(sum(weights)) < 1e-3:
        weights[0] += 1
    order = data.draw(st.permutations(range(len(parts))))
    fused = fuse(parts, weights, method)
    again = fuse([parts[i] for i in order], [weights[i] for i in order], method)
    assert same(fused, again)


@few
@given(adapters(), adapters(), adapters(), st.sampled_from(sorted(METHODS)))
def test_associative_where_the_table_says_so(a, b, c, method):
    if METHODS[method].associative:
        close(fuse([fuse([a, b], method=method), c], method=method), fuse([a, b, c], method=method))
        close(fuse([a, fuse([b, c], method=method)], method=method), fuse([a, b, c], method=method))


def test_the_table_claims_no_more_than_holds():
    """Each method that is not called associative has a counterexample."""
    a, b, c = (random_adapter(seed, k=10) for seed in (1, 2, 3))
    for name, method in METHODS.items():
        left = fuse([fuse([a, b], method=name), c], method=name)
        error = left.compare(fuse([a, b, c], method=name)).relative_difference
        assert method.associative == (error < 1e-6), name


@few
@given(st.lists(adapters(), min_size=1, max_size=4), st.sampled_from(["sum", "mean", "ties"]))
def test_the_dense_reference(parts, method):
    if method == "ties":
        parts = parts[:2]  # the sign of a sum of two is that of the exact sum
    weights = [0.5 + i for i in range(len(parts))]
    fused = fuse(parts, weights, method)
    assert set(fused) == {name for part in parts for name in part}
    for name in fused:
        shape = fused[name].support.shape
        dense = [
            reference.dense(part[name]).double() if name in part else torch.zeros(shape).double()
            for part in parts
        ]
        if method == "ties":
            expected = reference.elected_mean(dense, weights)
        else:
            expected = reference.weighted_sum(dense, weights)
            expected = expected / sum(weights) if method == "mean" else expected
        found = reference.dense(fused[name]).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)


def test_sum_by_hand():
    a = Adapter({"w": delta((2, 4), {0: 1.0, 3: 2.0, 6: -1.0})})
    b = Adapter({"w": delta((2, 4), {3: 10.0, 7: 5.0}), "v": delta((3,), {1: 4.0})})
    fused = fuse([a, b], [1.0, 0.5])
    assert fused["w"] == delta((2, 4), {0: 1.0, 3: 7.0, 6: -1.0, 7: 2.5})
    assert fused["v"] == delta((3,), {1: 2.0})
    assert fuse([a, b], [1.0, 3.0], "mean")["w"] == delta(
        (2, 4), {0: 0.25, 3: 8.0, 6: -0.25, 7: 3.75}
    )


def test_ties_by_hand():
    a = Adapter({"w": delta((1, 6), {0: 4.0, 1: -1.0, 2: 2.0, 3: 0.1})})
    b = Adapter({"w": delta((1, 6), {0: -1.0, 1: -3.0, 4: 0.2, 5: 5.0})})
    fused = fuse([a, b], method="ties", density=0.75)
    # trimmed: a loses 0.1, b loses 0.2; at 0 plus is elected (4 - 1), at 1 both agree
    assert fused["w"] == delta((1, 6), {0: 4.0, 1: -2.0, 2: 2.0, 5: 5.0})


def test_magnitude_keeps_to_the_budget_over_all_parameters():
    a, b = random_adapter(1), random_adapter(2)
    whole = fuse([a, b])
    for given_, count in (
        ({"k": 7}, 7),
        ({"k": 0}, 0),
        ({}, a.nnz),
        ({"density": 0.25}, int(0.25 * (15 + 16 + 24))),
    ):
        fused = fuse([a, b], method="magnitude", **given_)
        assert fused.nnz == count
        assert list(fused) == list(whole)
        everything = torch.cat([d.values.abs() for d in whole.values()]).sort(descending=True)
        kept = torch.cat([d.values.abs() for d in fused.values()]).sort(descending=True)
        assert torch.equal(kept.values, everything.values[:count])
        assert fused.metadata["fused"]["k"] == count


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_random_methods_take_a_seed_and_no_global_generator(method):
    a, b = random_adapter(1, k=12), random_adapter(2, k=12)
    state = torch.get_rng_state()
    first = fuse([a, b], method=method, seed=3)
    torch.manual_seed(99)
    assert fuse([a, b], method=method, seed=3) == first
    assert fuse([a, b], method=method, seed=4) != first
    torch.set_rng_state(state)
    fuse([a, b], method=method)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_adapters_are_dropped_independently():
    a = random_adapter(1, {"w": (100, 100)}, k=5000)
    fused = fuse([a, a], method="dare", density=0.5)
    assert abs(fused.nnz - 0.75 * 5000) < 5 * (5000 * 0.75 * 0.25) ** 0.5


def test_dare_keeps_the_mean():
    a = random_adapter(1, {"w": (100, 100)}, k=5000)
    total = sum((fuse([a, a * 0.5], method="dare", seed=i) for i in range(64)), start=0)
    mean = total / 64
    error = mean.compare(a * 1.5).relative_difference
    assert error < 2 * (1.25**0.5 / 1.5) / 64**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_made_in_float32_or_float64(dtype):
    a, b = random_adapter(1, dtype=dtype), random_adapter(1, dtype=dtype, slot=0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, fused in fuse([a, b], [1.0, 2**-9]).items():
        assert fused.values.dtype == wide
        assert torch.equal(fused.values, a[name].values.to(wide) * (1 + 2**-9))


def test_empty_and_foreign_parameters():
    empty = Adapter({"one.weight": delta((3, 5), {})})
    a = random_adapter(1)
    fused = fuse([a, empty])
    assert fused == a
    assert fuse([empty, empty]).nnz == 0
    assert fuse([Adapter({}), a]) == a
    for method in METHODS:
        assert fuse([empty, empty], method=method).nnz == 0
        assert set(fuse([empty, a], method=method)) == set(a)


def test_large_weights_have_int64_indices():
    shape = (2**17, 2**15)
    a = Adapter({"w": SparseDelta(Support(shape, torch.tensor([5, 2**32 - 1])), torch.ones(2))})
    fused = fuse([a, a, a])
    assert fused["w"].support.indices.dtype == torch.int64
    assert fused["w"].values.tolist() == [3.0, 3.0]


def test_progress():
    seen = []
    fuse(
        [random_adapter(1), random_adapter(2)],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ------------------------------------------------------------------------------------- metadata

BASE = {"base_model_name_or_path": "some/model", "task_type": "SEQ_CLS"}
MASK = {"mask_type": "random", "random_seed": 3, "r": 2, "target_modules": ["one", "two", "conv"]}


def with_metadata(adapter, **fields):
    return Adapter(dict(adapter), {**BASE, **MASK, **fields})


def test_the_record_tells_how_it_was_made():
    a = with_metadata(random_adapter(1), random_seed=1)
    b = with_metadata(random_adapter(2), random_seed=2)
    fused = fuse([a, b], [0.5, 2], "dare", density=0.25, seed=9, names=["poems", "code"])
    made = json.loads(json.dumps(fused.metadata))["fused"]
    assert (made["method"], made["density"], made["seed"]) == ("dare", 0.25, 9)
    assert made["from"] == [
        {"name": "poems", "weight": 0.5, "nnz": 18, "mask_type": "random", "random_seed": 1},
        {"name": "code", "weight": 2.0, "nnz": 18, "mask_type": "random", "random_seed": 2},
    ]
    assert fused.metadata["base_model_name_or_path"] == "some/model"
    assert fused.metadata["mask_type"] == "fused"
    for gone in ("random_seed", "r", "base_fingerprint"):
        assert gone not in fused.metadata
    assert fused.metadata["target_modules"] == ["one", "two", "conv"]


@pytest.mark.parametrize("number", [Fraction, np.float32])
def test_numbers_of_other_types_are_recorded_as_floats(number):
    options = {"method": "della", "density": number(0.5), "epsilon": number(0.25)}
    made = fuse([random_adapter(0), random_adapter(1)], **options).metadata["fused"]
    assert json.dumps([made["density"], made["epsilon"]]) == "[0.5, 0.25]"


def test_a_long_chain_has_a_short_record():
    a = random_adapter(1)
    total = sum((a for _ in range(50)), start=0)
    assert len(json.dumps(total.metadata)) < 500
    assert total.compare(a * 50).relative_difference < 1e-6


def test_a_mask_that_all_share_is_still_the_mask():
    a = with_metadata(random_adapter(1), base_fingerprint={"one.weight": "float32:" + "0" * 16})
    fused = fuse([a, a], [0.5, 0.25])
    assert {field: fused.metadata[field] for field in MASK} == MASK
    assert fused.metadata["base_fingerprint"] == a.metadata["base_fingerprint"]


def test_facts_are_kept_where_they_hold():
    a = with_metadata(random_adapter(1), base_fingerprint={"one.weight": "float32:" + "1" * 16})
    b = Adapter({"two.weight": random_adapter(2)["two.weight"]}, {**BASE, "r": 3})
    fused = fuse([a, b])
    # weight one has the positions of a alone, two has others; b does not have the target modules
    assert fused.metadata["base_fingerprint"] == a.metadata["base_fingerprint"]
    assert fused.metadata["mask_type"] == "fused"
    assert "target_modules" not in fused.metadata
    changed = fuse([a, random_adapter(2)])
    assert "base_fingerprint" not in changed.metadata


# --------------------------------------------------------------------------------------- errors


def test_other_bases_are_refused():
    a = random_adapter(1)
    other = Adapter(dict(random_adapter(2)), {"base_model_name_or_path": "other/model"})
    with pytest.raises(WrongBaseError, match=r"poems was trained on .*'some/model' but code"):
        fuse([Adapter(dict(a), BASE), other], names=["poems", "code"])
    assert fuse([Adapter(dict(a), BASE), other], check_base=False).nnz
    assert fuse([a, other]).nnz  # unknown is not another


def test_other_fingerprints_are_refused_where_positions_agree():
    a = random_adapter(1)
    prints = [{"base_fingerprint": {"two.weight": f"float32:{c * 16}"}} for c in "ab"]
    one, two = (Adapter(dict(a), fields) for fields in prints)
    with pytest.raises(WrongBaseError, match=r"'two\.weight'.*float32:aaaa.*float32:bbbb"):
        fuse([one, two])
    assert fuse([one, two], check_base=False) == a * 2
    elsewhere = Adapter(dict(random_adapter(2)), prints[1])
    assert fuse([one, elsewhere]).nnz  # hashes of different positions tell nothing
    rounded = Adapter(dict(a), {"base_fingerprint": {"two.weight": "bfloat16:" + "b" * 16}})
    assert fuse([one, rounded]) == a * 2


def test_other_shapes_are_refused_in_any_case():
    a, b = Adapter({"w": delta((2, 3), {0: 1.0})}), Adapter({"w": delta((3, 2), {0: 1.0})})
    with pytest.raises(AdapterError, match=r"'w' has shape \(2, 3\) in adapter 0 but \(3, 2\) in"):
        fuse([a, b], check_base=False)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "nothing to fuse"),
        ((random_adapter(1),), {}, "a list of adapters"),
        ((["adapter"],), {}, "Adapter.load reads one"),
        (([random_adapter(1)], [1, 2]), {}, "1 adapters need as many weights, not 2"),
        (([random_adapter(1)], [float("nan")]), {}, "finite"),
        (([random_adapter(1)], ["x"]), {}, "weights are numbers"),
        (([random_adapter(1)] * 2, [1, -1], "mean"), {}, "must not add up to 0"),
        (([random_adapter(1)] * 2, None, "tie"), {}, "Did you mean 'ties'"),
        (
            ([random_adapter(1)] * 2,),
            {"density": 0.5},
            "'sum' has no option 'density'; it has none",
        ),
        (([random_adapter(1)] * 2, None, "dare"), {"k": 5}, "it has density, seed"),
        (([random_adapter(1)] * 2, None, "ties"), {"density": 0.0}, r"\(0, 1\]"),
        (([random_adapter(1)] * 2, None, "ties"), {"majority_sign_method": "x"}, "'frequency'"),
        (([random_adapter(1)] * 2, None, "dare"), {"seed": 0.5}, "seed is an integer"),
        (
            ([random_adapter(1)] * 2, None, "della"),
            {"epsilon": 0.5, "density": 0.9},
            "from 0 to 0.2",
        ),
        (([random_adapter(1)] * 2, None, "magnitude"), {"k": -1}, "a number of entries"),
        (([random_adapter(1)] * 2, None, "magnitude"), {"k": 1, "density": 0.1}, "one of them"),
        (([random_adapter(1)] * 2,), {"names": ["a"]}, "as many names"),
    ],
)
def test_invalid_arguments(arguments, options, message):
    with pytest.raises((AdapterError, ConfigError), match=message):
        fuse(*arguments, **options)


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            fuse([random_adapter(1), random_adapter(2)], method=method)


# -------------------------------------------------------------------------------------- filling


@few
@given(adapters())
def test_filling_changes_no_value(adapter):
    r, filled = fill_to_rank(adapter)
    assert filled.compare(adapter).largest_difference == 0
    assert list(filled) == list(adapter)
    for name, part in filled.items():
        assert part.values.dtype == adapter[name].values.dtype
        assert part.support.union(adapter[name].support) == part.support
    if filled is not adapter:
        sides = {"one.weight": 8, "two.weight": 8, "conv.weight": 14}
        assert {name: part.nnz for name, part in filled.items()} == {
            name: r * sides[name] for name in filled
        }
        assert any(adapter[name].nnz > (r - 1) * sides[name] for name in filled) or r == 1


def test_filling_by_hand():
    a = Adapter({"w": delta((3, 4), {0: 1.0, 2: 2.0, 11: 3.0})}, {"x": 1})
    r, filled = fill_to_rank(a)
    assert r == 1
    assert filled["w"].support.indices.tolist() == [0, 1, 2, 3, 4, 5, 11]
    assert filled["w"].values.tolist() == [1, 0, 2, 0, 0, 0, 3]
    assert filled.metadata == {"x": 1, "r": 1}


def test_no_room_to_fill():
    a = random_adapter(1, {"w": (3, 4)}, k=9)  # 7 or 14 of 12 entries
    r, same = fill_to_rank(a)
    assert r == 1
    assert same is a


def test_nothing_to_fill():
    a = random_adapter(1, {"w": (6, 6)}, k=24)
    r, same = fill_to_rank(a)
    assert r == 2
    assert torch.equal(same["w"].support.indices, a["w"].support.indices)
    assert fill_to_rank(Adapter({}))[1] == Adapter({})


def test_nothing_is_kept_on_whatever_the_default_device():
    one = Adapter({"w": delta((4, 5), {3: 1.0})})
    with torch.device("meta"):
        assert one.prune(k=0)["w"].values.tolist() == []
