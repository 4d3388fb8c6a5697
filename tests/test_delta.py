# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import pickle
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.adapter import Adapter
from shira.delta import SparseDelta, checked_scale
from shira.errors import AdapterError, UnknownAdapterError
from shira.support import Support

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def delta(indices=(1, 5), values=(0.5, -2.0), shape=(3, 4), dtype=torch.float32):
    return SparseDelta(Support(shape, torch.tensor(indices)), torch.tensor(values, dtype=dtype))


# --- replacement values, against plain python arithmetic ----------------------------------------


def rounded(value: float, dtype: torch.dtype) -> float:
    """``value``, itself a float32 or float64 number, rounded once, to nearest, ties to even."""
    if dtype == torch.float64:
        return value
    if dtype == torch.float32:
        return float(np.float32(value))
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return float(np.float16(np.float32(value)))
    (bits,) = struct.unpack("<I", struct.pack("<f", np.float32(value)))
    bits += 0x7FFF + ((bits >> 16) & 1)  # bfloat16 is the upper half of a float32
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


@pytest.mark.parametrize("base_dtype", FLOATS)
@pytest.mark.parametrize("value_dtype", FLOATS)
@settings(deadline=None)
@given(
    pairs=st.lists(
        st.tuples(*[st.floats(-1e3, 1e3, width=16), st.floats(-4.0, 4.0, width=16)]), max_size=20
    ),
    scale=st.sampled_from([1.0, 0.0, -1.0, 0.5, 0.3, 1.7]),
)
def test_replacement_equals_arithmetic_entry_by_entry(base_dtype, value_dtype, pairs, scale):
    base = torch.tensor([p[0] for p in pairs], dtype=torch.float64).to(base_dtype)
    values = torch.tensor([p[1] for p in pairs], dtype=torch.float64).to(value_dtype)
    wide = np.float64 if torch.float64 in (base_dtype, value_dtype) else np.float32
    expected = [
        rounded(float(wide(b) + wide(v) * wide(scale)), base_dtype)
        for b, v in zip(base.double().tolist(), values.double().tolist(), strict=True)
    ]
    got = SparseDelta(Support((64,), torch.arange(len(pairs))), values).replacement(base, scale)
    assert got.dtype == base_dtype
    assert got.double().tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_delta_gives_the_base_back_bit_for_bit(dtype):
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero = SparseDelta(Support((1000,), torch.arange(1000)), torch.zeros(1000))
    assert torch.equal(zero.replacement(base), base)
    assert torch.equal(zero.replacement(base, 0.3), base)


# --- SparseDelta --------------------------------------------------------------------------------


def test_sparse_delta_is_a_value():
    value = delta()
    assert value.nnz == 2
    assert value == delta()
    assert value != delta(values=(0.5, -2.5))
    assert value != delta(indices=(1, 6))
    assert value != delta(dtype=torch.bfloat16)
    assert value != 3
    with pytest.raises(TypeError):
        hash(value)
    assert "nnz=2" in repr(value)
    assert "torch.float32" in repr(value)
    assert copy.deepcopy(value) == value == pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([1, 2]), "floating point, not torch.int64"),
        (torch.zeros(3), r"2 positions need values of shape \(2,\), not \(3,\)"),
        (torch.zeros(1, 2), r"not \(1, 2\)"),
        (torch.tensor(1.0), r"not \(\)"),
    ],
)
def test_values_that_do_not_fit(values, message):
    with pytest.raises(AdapterError, match=message):
        SparseDelta(Support((3, 4), torch.tensor([1, 5])), values)


def test_an_empty_delta():
    empty = SparseDelta(Support((3, 4), torch.empty(0, dtype=torch.int64)), torch.empty(0))
    assert empty.nnz == 0
    assert empty.replacement(torch.empty(0, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- Adapter ------------------------------------------------------------------------------------


def test_an_adapter_is_a_mapping():
    a, b = delta(), delta(indices=(0,), values=(1.0,), shape=(2, 2))
    adapter = Adapter({"x.weight": a, "y.weight": b}, {"seed": 3})
    assert list(adapter) == ["x.weight", "y.weight"]
    assert len(adapter) == 2
    assert adapter["x.weight"] is a
    assert "y.weight" in adapter
    assert "z" not in adapter
    assert adapter.get("z") is None
    assert dict(adapter.items()) == {"x.weight": a, "y.weight": b}
    assert adapter.metadata == {"seed": 3}
    assert adapter.nnz == 3
    assert adapter.density == 3 / 16
    assert repr(adapter) == "Adapter(2 parameters, nnz=3, density=0.1875)"
    with pytest.raises(TypeError):
        adapter["x.weight"] = b
    with pytest.raises(TypeError):
        hash(adapter)


def test_an_adapter_does_not_alias_what_it_was_made_of():
    deltas, metadata = {"x": delta()}, {"seed": 3}
    adapter = Adapter(deltas, metadata)
    deltas["y"] = delta()
    metadata["seed"] = 4
    assert list(adapter) == ["x"]
    assert adapter.metadata == {"seed": 3}


def test_equality_is_of_deltas_not_of_metadata_or_order():
    a, b = delta(), delta(values=(1.0, 1.0))
    assert Adapter({"x": a, "y": b}, {"seed": 1}) == Adapter({"y": b, "x": a})
    assert Adapter({"x": a}) != Adapter({"x": b})
    assert Adapter({"x": a}) != Adapter({"x": a, "y": b})
    assert Adapter({"x": a}) != {"x": a}


def test_an_empty_adapter():
    adapter = Adapter({})
    assert (len(adapter), adapter.nnz, adapter.density, adapter.metadata) == (0, 0, 0.0, {})


def test_an_unknown_parameter_names_near_ones():
    adapter = Adapter({"layers.0.q_proj.weight": delta()})
    with pytest.raises(UnknownAdapterError, match=r"'layers.0.q_prj.weight'. Did you mean 'layers"):
        adapter["layers.0.q_prj.weight"]
    with pytest.raises(KeyError):
        adapter["bias"]


@pytest.mark.parametrize("deltas", [{1: delta()}, {"x": torch.zeros(2)}, {"x": None}])
def test_an_adapter_holds_sparse_deltas_by_name(deltas):
    with pytest.raises(AdapterError, match="parameter names to SparseDelta"):
        Adapter(deltas)


# --- scales -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale", [0, -2, 0.5, 10**20, np.float32(0.25), np.int64(3), Fraction(1, 4)]
)
def test_a_scale_is_a_real_number(scale):
    checked = checked_scale("a", scale)
    assert type(checked) is float
    assert checked == scale


@pytest.mark.parametrize(
    "scale",
    [
        math.nan,
        math.inf,
        -math.inf,
        np.float32("nan"),
        10**400,
        -(10**5000),
        True,
        "1",
        None,
        1j,
        [1],
    ],
    ids=lambda scale: type(scale).__name__,
)
def test_a_scale_that_is_none(scale):
    with pytest.raises(AdapterError, match="the scale of 'a' is"):
        checked_scale("a", scale)
