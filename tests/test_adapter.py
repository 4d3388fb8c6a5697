# SPDX-License-Identifier: Apache-2.0
"""The operators of `Adapter`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira import Adapter, Support, fuse
from shira.errors import AdapterError, ConfigError, UnknownAdapterError
from tests.adapters import adapters, delta, few, random_adapter


@few
@given(adapters(), adapters(), st.floats(-8, 8, width=16))
def test_arithmetic_is_fuse(a, b, factor):
    assert a + b == fuse([a, b])
    assert a - b == fuse([a, b], [1, -1])
    assert a * factor == factor * a == fuse([a], [factor])
    assert -a == fuse([a], [-1])
    assert (a - b) + b == fuse([fuse([a, b], [1, -1]), b])


def test_scaling_and_difference_by_hand():
    a = Adapter({"w": delta((4,), {0: 1.0, 2: -3.0})})
    assert (a * 0.5)["w"] == delta((4,), {0: 0.5, 2: -1.5})
    assert (a / 2) == a * 0.5 == a * np.float32(0.5)
    zero = (a - a)["w"]
    assert zero.support == a["w"].support
    assert zero.values.tolist() == [0.0, 0.0]
    assert sum([a, a, a]) == a * 3


def test_no_operator_changes_its_operands():
    a, b = random_adapter(1), random_adapter(2)
    copies = [Adapter({n: delta_copy(d) for n, d in x.items()}, x.metadata) for x in (a, b)]
    _ = a + b, a - b, a * 2, -a, a.prune(3), a.restrict(b), a.to(torch.bfloat16), a.compare(b)
    assert [a, b] == copies
    assert a.metadata == {}


def delta_copy(part):
    return type(part)(
        Support(part.support.shape, part.support.indices.clone()), part.values.clone()
    )


@pytest.mark.parametrize("other", ["x", None, True, [1], object()])
def test_what_an_adapter_cannot_be_combined_with(other):
    a = random_adapter(1)
    with pytest.raises(TypeError):
        a * other
    with pytest.raises(TypeError):
        a + other
    with pytest.raises(TypeError):
        a - other
    with pytest.raises(TypeError):
        a / other


def test_impossible_factors():
    with pytest.raises(ConfigError, match="finite"):
        random_adapter(1) * float("inf")
    with pytest.raises(ConfigError, match="divided by 0"):
        random_adapter(1) / 0


# ------------------------------------------------------------------------------------- restrict


def test_restrict_to_parameters():
    a = random_adapter(1)
    part = a.restrict(["two.weight", "one.weight"])
    assert list(part) == ["one.weight", "two.weight"]
    assert part == a.restrict(lambda name: name != "conv.weight")
    assert part["one.weight"] is a["one.weight"]
    assert a.restrict("one.weight") == Adapter({"one.weight": a["one.weight"]})
    assert len(a.restrict([])) == 0
    with pytest.raises(UnknownAdapterError, match=r"Did you mean 'one\.weight'"):
        a.restrict(["one.weigth"])


def test_restrict_to_positions():
    a = Adapter({"w": delta((2, 4), {0: 1.0, 3: 2.0, 6: 3.0}), "v": delta((2,), {0: 1.0})})
    part = a.restrict({"w": Support((2, 4), torch.tensor([1, 3, 6]))})
    assert part == Adapter({"w": delta((2, 4), {3: 2.0, 6: 3.0})})
    assert a.restrict(a) == a
    with pytest.raises(AdapterError, match="does not fit"):
        a.restrict({"w": Support((4, 2), torch.tensor([1]))})
    with pytest.raises(UnknownAdapterError):
        a.restrict({"u": Support((2, 4), torch.tensor([1]))})
    with pytest.raises(AdapterError, match="to a Support, not int"):
        a.restrict({"w": 3})


@few
@given(adapters(torch.float32), adapters(torch.float32))
def test_an_adapter_is_the_sum_of_its_parts(a, b):
    """What is inside b's positions, and the rest."""
    common = [name for name in a if name in b]
    inside = a.restrict({name: b[name] for name in common})
    for name in common:
        assert inside[name].support == a[name].support.intersection(b[name].support)
    assert (a - inside).restrict(inside).compare(inside * 0).largest_difference == 0


def test_metadata_of_a_part():
    prints = {"one.weight": "float32:" + "1" * 16, "two.weight": "float32:" + "2" * 16}
    fields = {"mask_type": "random", "random_seed": 1, "target_modules": ["one", "two", "conv"]}
    a = Adapter(dict(random_adapter(1)), {**fields, "base_fingerprint": prints, "task_type": "X"})
    part = a.restrict(["one.weight"])
    assert part.metadata["base_fingerprint"] == {"one.weight": prints["one.weight"]}
    assert (part.metadata["random_seed"], part.metadata["task_type"]) == (1, "X")
    assert "target_modules" not in part.metadata  # they name weights that are not there
    fewer = a.restrict({"one.weight": Support((3, 5), torch.tensor([0, 1, 2]))})
    assert fewer.metadata["mask_type"] == "fused"
    assert "random_seed" not in fewer.metadata
    assert "base_fingerprint" not in fewer.metadata


# ---------------------------------------------------------------------------------- prune, cast


@few
@given(adapters(), st.integers(0, 60))
def test_prune_keeps_the_largest_and_their_bits(adapter, k):
    pruned = adapter.prune(k)
    assert pruned.nnz == min(k, adapter.nnz)
    kept = sorted((abs(float(v)) for d in pruned.values() for v in d.values), reverse=True)
    all_of = sorted((abs(float(v)) for d in adapter.values() for v in d.values), reverse=True)
    assert kept == all_of[: len(kept)]
    for name, part in pruned.items():
        at = adapter[name].support.positions_of(part.support)
        assert part.values.dtype == adapter[name].values.dtype
        assert torch.equal(part.values, adapter[name].values[at])


def test_of_equal_magnitudes_the_first_are_kept_in_whatever_order_parameters_come():
    parts = {"b": delta((4,), {0: 1.0, 3: -1.0}), "a": delta((4,), {1: -1.0, 2: 1.0})}
    pruned = Adapter(parts).prune(3)
    assert list(pruned) == ["b", "a"]
    assert pruned == Adapter({"a": parts["a"], "b": delta((4,), {0: 1.0})})
    assert pruned == Adapter(dict(reversed(parts.items()))).prune(3)


def test_prune_to_a_density():
    a = random_adapter(1)
    assert a.density == pytest.approx(18 / 55)
    assert a.prune(density=0.2).density == pytest.approx(11 / 55)
    assert a.prune(density=0.5) is a
    assert a.prune(10**6) is a
    for arguments in ({}, {"k": 2, "density": 0.1}, {"density": 0}, {"density": 2}, {"k": 0.5}):
        with pytest.raises(ConfigError):
            a.prune(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast(dtype):
    a = random_adapter(1)
    for name, part in a.to(dtype).items():
        assert torch.equal(part.values, a[name].values.to(dtype))
        assert part.support is a[name].support
    assert a.to(dtype).to(torch.float64).to(dtype) == a.to(dtype)
    assert a.to(device="cpu") == a


def test_cast_refuses_what_does_not_fit():
    a = Adapter({"w": delta((4,), {0: 1.0, 1: 7e4})})
    with pytest.raises(AdapterError, match=r"1 values of 'w' are too large for torch\.float16"):
        a.to(torch.float16)
    with pytest.raises(AdapterError, match="floating point"):
        a.to(torch.int8)


# -------------------------------------------------------------------------------------- compare


def test_compare():
    a = Adapter({"w": delta((2, 4), {0: 3.0, 3: 2.0, 6: 4.0}), "only": delta((2,), {0: 1.0})})
    b = Adapter({"w": delta((2, 4), {0: 3.0, 3: 1.5, 7: -6.0})})
    found = a.compare(b)
    assert not found.equal
    assert (found.only_in_a, found.only_in_b) == (("only",), ())
    assert (found.shared, found.differing) == (2, 1)
    assert (found.positions_only_in_a, found.positions_only_in_b) == (1, 1)
    assert (found.largest_difference, found.where) == (6.0, "w")
    assert found.relative_difference == pytest.approx((0.25 + 16 + 36) ** 0.5 / 29**0.5)
    assert found.as_json()["where"] == "w"
    assert "largest difference 6 (in w)" in str(found)


@few
@given(adapters(), adapters())
def test_compare_agrees_with_equality(a, b):
    assert a.compare(b).equal == (a == b)
    itself = a.compare(a)
    assert itself.equal
    assert (itself.differing, itself.largest_difference, itself.relative_difference) == (0, 0, 0)
    assert str(itself).startswith("equal, bit for bit")


def test_compare_names_what_is_unlike():
    a, b = random_adapter(1), random_adapter(1, dtype=torch.bfloat16)
    assert a.compare(b).unlike_dtype == tuple(a)
    other = Adapter({"one.weight": delta((5, 3), {0: 1.0})})
    assert a.compare(other).unlike_shape == ("one.weight",)
    with pytest.raises(AdapterError, match="not int"):
        a.compare(3)
