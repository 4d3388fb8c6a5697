# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import SupportError
from shira.ops import gaps, native


@pytest.fixture(autouse=True, scope="module", params=["compiled", "compiled for any CPU", "numpy"])
def way(request):
    """By the compiled kernels, and without them."""
    kernels = gaps._kernels()
    if request.param != "numpy" and kernels is None:
        pytest.skip("needs the compiled kernels")
    if request.param == "compiled for any CPU":
        kernels = native.kernels_for("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "_kernels", lambda: None if request.param == "numpy" else kernels)
        yield


BIG = 2**31 + 12345  # indices beyond int32


def reference(indices: list[int], largest: int) -> list[int]:
    """The specification, unit by unit."""
    units, before = [], -1
    for index in indices:
        gap = index - before - 1
        units += [largest] * (gap // largest) + [gap % largest]
        before = index
    return units


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.sets(st.integers(0, 700), max_size=60),
        st.sets(st.integers(0, 200_000), max_size=20),
        st.sets(st.integers(0, BIG - 1), max_size=6),
        st.sets(st.sampled_from([0, 1, 254, 255, 256, 509, 510, 511, 765, 766])),
    ),
    st.sampled_from(list(gaps.UNITS.values())),
)
def test_equals_the_specification_and_comes_back(chosen: set[int], unit: np.dtype) -> None:
    indices = np.array(sorted(chosen), np.int64 if max(chosen, default=0) >= 2**31 else np.int32)
    numel = BIG if indices.dtype == np.int64 else max(chosen, default=0) + 1
    before = indices.copy()
    units = gaps.encode(indices)
    assert units.tolist() == reference(sorted(chosen), np.iinfo(units.dtype).max)
    assert np.array_equal(indices, before)
    found = gaps.decode(units, numel)
    assert found.tolist() == indices.tolist()
    assert found.dtype == indices.dtype
    if unit.itemsize > 1 or max(chosen, default=0) < 10**6:  # any unit can be read
        code = np.array(reference(sorted(chosen), np.iinfo(unit).max), unit)
        assert gaps.decode(code, numel).tolist() == indices.tolist()
        # The unit taken is the one of fewest bytes.
        assert units.nbytes <= code.nbytes


@pytest.mark.parametrize("density", [0.3, 0.05, 0.02, 0.01, 0.003, 0.0005, 0.00002])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_many_pieces(density: float, dtype: type) -> None:
    """More indices and units than are worked on at a time, gaps that span pieces."""
    rng = np.random.default_rng(3)
    numel = int(100_000 / density)
    dtype = np.promote_types(dtype, gaps.index_type(numel))
    indices = np.unique(rng.integers(0, numel, 100_000)).astype(dtype)
    units = gaps.encode(indices)
    assert np.array_equal(gaps.decode(units, numel), indices)
    assert gaps.count_of(units) == len(indices)
    narrow = np.array(reference(indices.tolist(), 255), np.uint8)
    assert units.nbytes <= narrow.nbytes
    if density >= 0.0005:
        assert np.array_equal(gaps.decode(narrow, numel), indices)


def test_a_gap_left_open_over_many_pieces() -> None:
    gap = 255 * (3 * 2**14 + 5) + 17
    units = np.array([4] + [255] * (gap // 255) + [17, 0], np.uint8)
    assert gaps.decode(units, gap + 7).tolist() == [4, gap + 5, gap + 6]


def test_bytes_per_index_at_two_percent() -> None:
    rng = np.random.default_rng(0)
    numel = 4096 * 4096
    indices = np.sort(rng.choice(numel, numel // 50, replace=False)).astype(np.int32)
    assert gaps.encode(indices).nbytes / len(indices) < 1.01


def test_no_indices() -> None:
    units = gaps.encode(np.empty(0, np.int32))
    assert units.tolist() == []
    assert gaps.decode(units, 0).tolist() == []


@pytest.mark.parametrize(
    ("units", "numel", "match"),
    [
        ([0, 255], 1000, "does not end"),
        ([255], 1000, "does not end"),
        ([9], 9, "index 9 is out of range: the weight has 9"),
        ([255, 0], 255, "index 255 is out of range"),
        ([0] * 11, 10, "index 10 is out of range"),
        ([0], 0, "out of range"),
        ([255] * 100_000 + [0], 10**6, "out of range"),
    ],
)
def test_what_it_refuses(units: list[int], numel: int, match: str) -> None:
    with pytest.raises(SupportError, match=match):
        gaps.decode(np.array(units, np.uint8), numel)


@pytest.mark.parametrize("count", [0, 2, 4, 10**18])
def test_another_number_of_indices_is_refused(count: int) -> None:
    units = np.array([7, 255, 3, 0], np.uint8)
    assert gaps.decode(units, 300, 3).tolist() == [7, 266, 267]
    with pytest.raises(SupportError, match=f"stands for 3 entries, but there are {count} values"):
        gaps.decode(units, 300, count)


def test_four_byte_units_that_sum_past_64_bits_are_refused() -> None:
    """They cannot: 2^31 units of 2^32 are below 2^63; but past 2^32 they can."""
    units = np.array([2**32 - 2] * 1000, "<u4")
    with pytest.raises(SupportError, match=f"index {1000 * (2**32 - 1) - 1} is out of range"):
        gaps.decode(units, 2**40)
    assert gaps.decode(units[:1], 2**32)[0] == 2**32 - 2


@pytest.mark.parametrize("count", [0, 1, 255, gaps.BLOCK, gaps.BLOCK + 1, 5 * gaps.BLOCK])
@pytest.mark.parametrize("unit", list(gaps.UNITS.values()))
def test_reading_from_a_mark_on(count: int, unit: np.dtype) -> None:
    largest = np.iinfo(unit).max
    units = np.random.default_rng(4).choice([0, 7, largest], count).astype(unit)
    if count:
        units[-1] = 3
    whole = gaps.decode(units, 2**60)
    found = gaps.marks(units)
    assert found.shape == (-(-count // gaps.BLOCK) + 1, 2)
    for block, (entries, first) in enumerate(found):
        rest = gaps.decode(units[block * gaps.BLOCK :], 2**60)
        assert entries == len(whole) - len(rest)
        assert np.array_equal(rest + first, whole[entries:])


def test_no_wider_unit_than_allowed() -> None:
    indices = np.array([5, 300_000, 900_000], np.int32)
    for widest in gaps.UNITS:
        units = gaps.encode(indices, widest=widest)
        assert units.dtype.itemsize <= gaps.UNITS[widest].itemsize
        assert gaps.decode(units, 2**20).tolist() == indices.tolist()


def test_units_that_lie_apart_in_memory_are_those_that_are_read() -> None:
    apart = np.array([3, 200, 3, 200, 3, 200], np.uint8)[::2]
    assert gaps.decode(apart, 100).tolist() == [3, 7, 11]
    packed = torch.from_numpy(apart)
    support = gaps.support_of(packed, (10, 10))
    assert gaps.gaps_of(support, packed).units.is_contiguous()


def test_on_the_cpu_whatever_the_default_device() -> None:
    indices = np.arange(0, 50_000, 7, dtype=np.int32)
    with torch.device("meta"):
        assert gaps.decode(gaps.encode(indices), 50_000).tolist() == indices.tolist()


@pytest.mark.parametrize("numel", [10, 2**31])
def test_decoding_takes_about_what_the_indices_take(numel: int) -> None:
    """Also units that are refused: a file may hold two bytes for each."""
    units = np.full(2_000_000, 3, np.uint8)
    tracemalloc.start()
    try:
        found = gaps.decode(units, numel)
        assert found[-1] == 4 * len(units) - 1
    except SupportError:
        assert numel == 10
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 6 * len(units)
