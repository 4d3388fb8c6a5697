# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import SupportError
from shira.support import Support, index_dtype, matrix_shape

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@st.composite
def chosen(draw, count=1):
    """A shape and ``count`` sets of flat indices into it."""
    shape = draw(shapes)
    entries = st.sets(st.integers(0, math.prod(shape) - 1))
    return shape, *(draw(entries) for _ in range(count))


def support(shape, entries):
    return Support(shape, torch.tensor(sorted(entries), dtype=torch.int64))


# --- set algebra, against python's sets ---------------------------------------------------------


@settings(deadline=None)
@given(chosen(2))
def test_set_algebra(case):
    shape, a, b = case
    left, right = support(shape, a), support(shape, b)
    assert left.union(right).indices.tolist() == sorted(a | b)
    assert left.intersection(right).indices.tolist() == sorted(a & b)
    assert left.overlap(right) == len(a & b)
    order = sorted(a)
    assert left.positions_of(right).tolist() == [
        order.index(entry) if entry in a else -1 for entry in sorted(b)
    ]
    assert left.positions_of(right).dtype == torch.int64
    assert (left == right) == (a == b)
    assert left.union(right).shape == left.intersection(right).shape == shape


@settings(deadline=None)
@given(chosen(), st.randoms())
def test_the_ways_to_make_one_agree(case, rng):
    shape, entries = case
    expected = support(shape, entries)
    shuffled = list(entries)
    rng.shuffle(shuffled)
    unsorted = torch.tensor(shuffled, dtype=torch.int64)
    assert Support.from_unsorted(shape, unsorted) == expected
    assert Support.from_mask(expected.mask()) == expected
    assert Support.from_mask(expected.mask().double()) == expected
    assert Support.from_coordinates(shape, expected.coordinates()) == expected


@settings(deadline=None)
@given(chosen())
def test_size_and_density(case):
    shape, entries = case
    value = support(shape, entries)
    assert value.nnz == len(value) == len(entries)
    assert value.numel == math.prod(shape)
    assert value.density == len(entries) / math.prod(shape)
    assert value.indices.dtype == torch.int32
    assert value.mask().shape == shape
    assert value.mask().view(-1).nonzero().view(-1).tolist() == sorted(entries)


@settings(deadline=None)
@given(chosen())
def test_coordinates_are_the_rows_and_columns_of_a_dense_mask(case):
    shape, entries = case
    value = support(shape, entries)
    rows, cols = matrix_shape(shape)
    expected = value.mask().view(rows, cols).nonzero().t()
    assert value.coordinates().dtype == torch.int32
    assert value.coordinates().tolist() == expected.tolist()


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4, 0), (0,)])
def test_empty(shape):
    empty = Support(shape, torch.empty(0, dtype=torch.int64))
    assert (empty.nnz, empty.density, len(empty)) == (0, 0.0, 0)
    assert empty.coordinates().shape == (2, 0)
    assert empty.union(empty) == empty.intersection(empty) == empty
    assert empty.overlap(empty) == 0
    assert empty.positions_of(empty).tolist() == []
    assert not empty.mask().any()
    assert Support.from_mask(torch.zeros(shape)) == empty
    assert Support.from_coordinates(shape, empty.coordinates()) == empty


def test_one_entry_and_a_scalar_weight():
    one = Support((1, 1), torch.tensor([0]))
    assert one.density == 1.0
    assert one.coordinates().tolist() == [[0], [0]]
    assert Support.from_mask(torch.tensor(True)).shape == ()
    assert Support((), torch.tensor([0])).numel == 1


def test_int64_above_2_31_entries_without_allocating_them():
    shape = (2**20, 2**20)
    entries = [0, 2**31 - 1, 2**31, 2**40 - 1]
    value = Support(shape, torch.tensor(entries))
    assert value.indices.dtype == torch.int64
    assert value.coordinates().tolist() == [
        [entry // 2**20 for entry in entries],
        [entry % 2**20 for entry in entries],
    ]
    assert Support.from_coordinates(shape, value.coordinates()) == value
    other = Support(shape, torch.tensor([5, 2**31, 2**40 - 1]))
    assert value.intersection(other).indices.tolist() == [2**31, 2**40 - 1]
    assert value.union(other).indices.tolist() == [0, 5, 2**31 - 1, 2**31, 2**40 - 1]
    with pytest.raises(SupportError, match=str(2**40)):
        Support(shape, torch.tensor([2**40]))


def test_dtype_of_indices_changes_just_where_int32_ends():
    assert index_dtype(2**31) == torch.int32  # the last index is 2^31 - 1
    assert index_dtype(2**31 + 1) == torch.int64
    last = Support((2**31,), torch.tensor([2**31 - 1]))
    assert last.indices.tolist() == [2**31 - 1]
    # an index that would wrap round to a valid one
    with pytest.raises(SupportError, match=str(2**32)):
        Support((2**31,), torch.tensor([2**32]))


def test_coordinates_beyond_int32_are_refused():
    with pytest.raises(SupportError, match="int32"):
        Support((2**32,), torch.tensor([2**31 + 7])).coordinates()


@pytest.mark.parametrize(
    "dtype",
    ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"],
)
def test_any_integer_dtype(dtype):
    dtype = getattr(torch, dtype)
    expected = Support((3, 4), torch.tensor([2, 7]))
    assert Support((3, 4), torch.tensor([2, 7]).to(dtype)) == expected
    assert Support.from_unsorted((3, 4), torch.tensor([7, 2]).to(dtype)) == expected
    coordinates = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    assert Support.from_coordinates((3, 4), coordinates) == expected


def test_a_view_of_other_strides_is_copied_contiguous():
    indices = torch.arange(10)[::2]
    assert Support((10,), indices).indices.is_contiguous()


def test_shape_becomes_a_plain_tuple():
    for shape in ([2, 3], torch.Size((2, 3)), (2, 3)):
        assert Support(shape, torch.tensor([1])).shape == (2, 3)
    assert type(Support(torch.Size((2, 3)), torch.tensor([1])).shape) is tuple


def test_copies_and_pickles():
    value = Support((3, 4), torch.tensor([1, 2]))
    assert pickle.loads(pickle.dumps(value)) == value
    twin = copy.deepcopy(value)
    assert twin == value
    assert twin.indices.data_ptr() != value.indices.data_ptr()


def test_to_device():
    value = Support((3, 4), torch.tensor([1, 2]))
    assert value.to("cpu") == value
    assert value.to("meta").indices.device.type == "meta"


def test_equality_hash_and_repr():
    value = Support((3, 4), torch.tensor([1, 2]))
    assert value != Support((4, 3), torch.tensor([1, 2]))
    assert value != Support((3, 4), torch.tensor([1, 3]))
    assert value != "support"
    with pytest.raises(TypeError):
        hash(value)
    assert repr(value) == "Support(shape=(3, 4), nnz=2, density=0.1667)"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 5, 7), (2, 105)), ((0, 3), (0, 3))],
)
def test_matrix_shape(shape, expected):
    assert matrix_shape(shape) == expected


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "indices", "message"),
    [
        ((3, 4), [0, 1], "integer tensor, not list"),
        ((3, 4), torch.tensor([0.0, 1.0]), "integers, not torch.float32"),
        ((3, 4), torch.tensor([True]), "integers, not torch.bool"),
        ((3, 4), torch.tensor([1j]), "integers, not torch.complex64"),
        ((3, 4), torch.tensor([[0, 1]]), r"one-dimensional, not of shape \(1, 2\)"),
        ((3, 4), torch.tensor(1), r"one-dimensional, not of shape \(\)"),
        ((3, 4), torch.tensor([-1, 2]), "-1 is negative"),
        ((3, 4), torch.tensor([0, 12]), r"12 is outside a weight of shape \(3, 4\) \(12 entries\)"),
        ((3, 4), torch.tensor([1, 5, 5]), r"5 \(entry 1\) occurs twice"),
        ((3, 4), torch.tensor([1, 5, 3]), r"5 \(entry 1\) comes before the smaller 3"),
        ((3, -4), torch.tensor([0]), "no negative sizes"),
        ((0, 4), torch.tensor([0]), "outside"),
    ],
)
def test_bad_indices(shape, indices, message):
    with pytest.raises(SupportError, match=message):
        Support(shape, indices)


def test_from_unsorted_refuses_what_cannot_be_sorted_out():
    with pytest.raises(SupportError, match="occurs twice"):
        Support.from_unsorted((3, 4), torch.tensor([5, 1, 5]))
    with pytest.raises(SupportError, match="not list"):
        Support.from_unsorted((3, 4), [5, 1])
    with pytest.raises(SupportError, match="float32"):
        Support.from_unsorted((3, 4), torch.tensor([1.0]))


@pytest.mark.parametrize("odd", [2.0, -1.0, 0.5, math.nan, math.inf])
def test_a_mask_holds_zeros_and_ones(odd):
    mask = torch.tensor([[0.0, 1.0], [odd, odd]])
    with pytest.raises(SupportError, match=f"2 of its entries are others, .*{odd}"):
        Support.from_mask(mask)


def test_a_mask_is_a_tensor():
    with pytest.raises(SupportError, match="not list"):
        Support.from_mask([[0, 1]])


def test_a_mask_is_read_in_logical_order():
    mask = torch.tensor([[0, 1, 0], [1, 0, 0]]).t()
    assert Support.from_mask(mask) == Support((3, 2), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        ([[0], [0]], "not list"),
        (torch.zeros(2, 1), "integers, not torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int64), r"shape \(2, k\).*not \(3, 2\)"),
        (torch.zeros(2, dtype=torch.int64), r"shape \(2, k\)"),
        (torch.tensor([[3], [0]]), r"row 3 is outside .* \(3 rows\)"),
        (torch.tensor([[0], [4]]), r"column 4 is outside .* \(4 columns\)"),
        (torch.tensor([[-1], [0]]), "row -1 is outside"),
        (torch.tensor([[0], [-1]]), "column -1 is outside"),
        (torch.tensor([[0, 0], [1, 1]]), "occurs twice"),
        (torch.tensor([[1, 0], [0, 0]]), "comes before"),
    ],
)
def test_bad_coordinates(coordinates, message):
    with pytest.raises(SupportError, match=message):
        Support.from_coordinates((3, 4), coordinates)


@pytest.mark.parametrize("method", ["union", "intersection", "overlap", "positions_of"])
def test_supports_of_different_shapes_do_not_mix(method):
    a, b = Support((3, 4), torch.tensor([1])), Support((4, 3), torch.tensor([1]))
    with pytest.raises(SupportError, match=r"\(3, 4\) and \(4, 3\)"):
        getattr(a, method)(b)
