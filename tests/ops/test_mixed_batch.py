# SPDX-License-Identifier: Apache-2.0
"""`add_products` against the dense reference: the compiled kernel, and torch's own ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops
from shira.errors import AdapterError, SupportError
from shira.ops import native, plan

from .cases import (
    batch,
    check_against_the_reference,
    kernels_of,
    needs_kernels,
    random_indices,
    torch_threads,
    values,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETS = ["base", "avx2", "avx512"]
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def with_kernels(kernels, case, transposed=False):
    result, x, rows, counts, deltas, indices, shape = case
    plans = [ops.make_plan([index], shape, (shape[1], 1)) for index in indices]
    places = native.Places([plan.gaps for plan in plans])
    result = result.clone()
    groups = native.Batch(places, deltas, counts)
    assert kernels.add_products(result, x, rows, groups, shape, transposed) == -1
    return result


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_add_products_in_one_call_equals_reference(instruction_set, data):
    shape = data.draw(st.sampled_from([(1, 50), (40, 3), (64, 64), (17, 1000), (300, 200)]))
    counts = data.draw(st.sampled_from([[1], [2, 5, 0, 1], [9, 17, 33, 70], [1, 1, 1, 1]]))
    density = data.draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]))
    dtype, kind = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(KINDS))
    transposed = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    case = batch(shape, counts, density, dtype, kind, transposed)
    got = with_kernels(kernels_of(instruction_set), case, transposed)
    check_against_the_reference(case, got, transposed)


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_rows_bits_are_the_same_by_gaps_and_by_columns_and_at_any_width(instruction_set, data):
    """In rows that are in several pieces of 512 entries, too, and in blocks of 2048."""
    kernels = kernels_of(instruction_set)
    shape = data.draw(st.sampled_from([(1, 50), (1, 30000), (40, 3), (17, 1000), (3, 2**16)]))
    density = data.draw(st.sampled_from([0.0, 0.001, 0.1, 1.0]))
    dtype, kind = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(KINDS))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    result, x, rows, _, (delta,), (index,), _ = batch(shape, [1], density, dtype, kind, False)
    gaps = ops.make_plan([index], shape, (shape[1], 1)).gaps
    columns = native.Places([gaps], {0: kernels.columns(gaps, shape)})
    ones = native.Batch(native.Places([gaps]), [delta], [1])
    want = result.clone()
    assert kernels.add_products(want, x, rows, ones, shape, False) == -1
    got = result.clone()
    given = native.Batch(columns, [delta], [1])
    assert kernels.add_products(got, x, rows, given, shape, False) == -1
    assert torch.equal(got, want)
    for width in (2, 7, 20, 70):
        many = result[rows].repeat(width, 1), x[rows].repeat(width, 1), torch.arange(width)
        groups = native.Batch(native.Places([gaps]), [delta], [width])
        assert kernels.add_products(*many, groups, shape, False) == -1
        assert torch.equal(many[0], want[rows].expand(width, -1))


@needs_kernels
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("instruction_set", SETS)
def test_a_rows_bits_depend_on_no_other_row_and_no_thread(instruction_set, transposed, monkeypatch):
    kernels = kernels_of(instruction_set)
    torch.manual_seed(0)
    case = batch((300, 200), [1, 3, 7, 20, 33, 70], 0.05, torch.float32, torch.float32, transposed)
    result, x, rows, counts, deltas, indices, shape = case
    got = with_kernels(kernels, case, transposed)
    alone = result.clone()
    for at, delta, index in zip(rows.split(counts), deltas, indices, strict=True):
        for row in at.split(1):
            one = (alone, x, row, [1], [delta], [index], shape)
            alone = with_kernels(kernels, one, transposed)
    assert torch.equal(got, alone)
    with torch_threads(3):
        assert torch.equal(got, with_kernels(kernels, case, transposed))
    monkeypatch.setattr(native, "_ROOM", 1)  # a tile at a time
    assert torch.equal(got, with_kernels(kernels, case, transposed))


@needs_kernels
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("instruction_set", SETS)
def test_add_products_over_wide_gaps_and_many_blocks(instruction_set, transposed):
    """Rows without entries, gaps of several units, rows of more entries than a block of units."""
    torch.manual_seed(0)
    few = torch.cat(
        [torch.tensor([3, 900]), torch.arange(70_000, 76_000), torch.tensor([76_800, 99_999])]
    )
    wide = torch.randint(2, 600, (5000,)).cumsum(0)  # in units of one byte, and rows often empty
    for flat, shape in (
        *((few, shape) for shape in ((1000, 100), (10, 10_000), (100, 1000))),
        *((wide, shape) for shape in ((30_000, 100), (1000, 3000))),
    ):
        index = torch.stack((flat // shape[1], flat % shape[1])).int()
        for counts in ([1], [20]):
            result, x, rows, *_ = batch(shape, counts, 0, torch.float32, torch.float32, transposed)
            delta = torch.randn(len(flat))
            case = (result, x, rows, counts, [delta], [index], shape)
            got = with_kernels(kernels_of(instruction_set), case, transposed)
            check_against_the_reference(case, got, transposed)


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
def test_infinite_numbers_stay_where_they_are(instruction_set):
    """Lanes that stand for no entry multiply zeros, never what x holds elsewhere."""
    torch.manual_seed(0)
    for count in (1, 3, 20):
        case = batch((30, 64), [count], 0.1, torch.float32, torch.float32)
        x, rows, (index,) = case[1], case[2], case[5]
        x[:, ::31] = torch.inf
        got = with_kernels(kernels_of(instruction_set), case)
        touched = torch.zeros(30, dtype=torch.bool)
        touched[index[0, index[1] % 31 == 0].long()] = True
        assert 0 < touched.sum() < 30
        assert not got[rows][:, ~touched].isnan().any()
        assert got[rows][:, ~touched].isfinite().all()
        assert not got[rows][:, touched].isfinite().any()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_add_products_whichever_way_it_is_computed(data):
    dtype, kind = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    transposed, strided = data.draw(st.booleans()), data.draw(st.booleans())
    counts = data.draw(st.sampled_from([[], [0], [1, 2], [3, 0, 4]]))
    density = data.draw(st.sampled_from([0.0, 0.5]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    case = batch((6, 9), counts, density, dtype, kind, transposed)
    result, x, *rest = case
    x = x.t().contiguous().t() if strided else x
    got = result.t().contiguous().t() if strided else result.clone()
    returned = ops.add_products(got, x, *rest, transposed=transposed)
    assert returned.data_ptr() == got.data_ptr()
    check_against_the_reference(case, got, transposed)


@needs_kernels
def test_the_kernel_and_torch_agree_and_only_torch_is_watched(monkeypatch):
    torch.manual_seed(0)
    case = batch((40, 50), [1, 9], 0.2, torch.float32, torch.float32)
    result, x, rows, counts, deltas, indices, shape = case
    fast = ops.add_products(result.clone(), *case[1:])
    watched = [delta.clone().requires_grad_() for delta in deltas]
    slow = ops.add_products(result.clone(), x, rows, counts, watched, indices, shape)
    torch.testing.assert_close(fast, slow)
    slow.sum().backward()
    assert all(delta.grad.abs().sum() > 0 for delta in watched)
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "none"))
    assert torch.equal(slow, ops.add_products(result.clone(), *case[1:]))


def test_add_products_refuses_what_compiled_code_would_read_beyond():
    result, x, rows, counts, deltas, indices, shape = batch(
        (5, 6), [2], 0.5, torch.float32, torch.float32
    )
    with pytest.raises(AdapterError, match="15 positions need as many values, not 14"):
        ops.add_products(result, x, rows, counts, [deltas[0][1:]], indices, shape)
    with pytest.raises(SupportError, match="row 5"):
        ops.add_products(result, x, rows, counts, deltas, [indices[0] + 1], shape)
    with pytest.raises(RuntimeError):
        ops.add_products(result, x[:, 1:], rows, counts, deltas, indices, shape)
    with pytest.raises(RuntimeError):
        ops.add_products(result, x, rows, [3], deltas, indices, shape)


def test_add_products_takes_rows_in_strides_and_refuses_what_torch_does():
    x, delta, indices = torch.randn(9, 4), values(3, torch.float32), random_indices((3, 4), 3)
    rows, rest = torch.arange(9)[::2], ([delta], [indices], (3, 4))
    assert not rows.is_contiguous()
    found = ops.add_products(torch.zeros(9, 3), x, rows, [5], *rest)
    torch.testing.assert_close(found[::2], ops.sparse_product(x[::2], delta, indices, (3, 4)))
    assert not found[1::2].any()
    with pytest.raises(RuntimeError, match="long"):
        ops.add_products(torch.zeros(9, 3), x, rows.int(), [5], *rest)
    with pytest.raises(IndexError, match="out of range"):
        ops.add_products(torch.zeros(9, 3), x[:2], rows, [5], *rest)


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
def test_the_kernel_tells_rows_that_it_cannot_use_and_writes_nothing(instruction_set):
    kernels = kernels_of(instruction_set)
    for transposed in (False, True):
        case = batch((40, 50), [1, 9, 3], 0.2, torch.float32, torch.float32, transposed)
        result, x, rows, counts, deltas, indices, shape = case
        plans = [ops.make_plan([index], shape, (shape[1], 1)) for index in indices]
        places, got = native.Places([plan.gaps for plan in plans]), result.clone()
        groups = native.Batch(places, deltas, counts)
        for at, row in ((0, -1), (12, len(x)), (5, 2**62), (7, -(2**62)), (12, int(rows[0]))):
            wrong = rows.clone()
            wrong[at] = row
            assert kernels.add_products(got, x, wrong, groups, shape, transposed) == at
            assert torch.equal(got, result)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_in_several_dimensions(compiled, transposed, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "none"))
    torch.manual_seed(0)
    case = batch((40, 50), [5, 2, 3], 0.2, torch.float32, torch.float32, transposed)
    result, x, rows, counts, deltas, indices, shape = case
    groups = ops.DeltaGroups(counts, deltas, indices, shape, transposed=transposed)
    want = groups.add(result.clone(), x, rows)
    tokens = len(x)
    once, one = result.clone().view(1, tokens, -1), x.view(1, tokens, -1)
    assert torch.equal(groups.add(once, one, rows)[0], want)
    assert torch.equal(once[0], want)  # in place
    apart = torch.stack((result, result), 1)[:, :1]  # of strides
    assert torch.equal(groups.add(apart, x.unsqueeze(1), rows)[:, 0], want)


@needs_kernels
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(40, 50), (5, 2**16), (5, 2**16 + 1)])
def test_groups_are_added_again_with_the_same_bits(shape, transposed):
    case = batch(shape, [1, 3, 0, 1], 0.2, torch.float32, torch.float32, transposed)
    result, x, rows, counts, deltas, indices, shape = case
    groups = ops.DeltaGroups(counts, deltas, indices, shape, transposed=transposed)
    assert groups.lasting
    want = groups.add(result.clone(), x, rows)
    for _ in range(3):
        assert torch.equal(groups.add_again(result.clone(), x, rows), want)
    deltas[0].mul_(2)  # values are read at each call
    doubled = groups.add_again(result.clone(), x, rows)
    assert torch.equal(doubled, groups.add(result.clone(), x, rows))
    assert not torch.equal(doubled, want)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize(
    ("row", "why"), [(-1, "out of range"), (9, "out of range"), (2, "named twice")]
)
def test_rows_out_of_range_or_named_twice_are_refused(row, why, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "none"))
    result, x, delta = torch.zeros(9, 3), torch.randn(9, 4), torch.randn(3)
    indices, rows = random_indices((3, 4), 3), torch.tensor([2, 0, row])
    with pytest.raises(SupportError, match=f"row {row} .*{why}"):
        ops.add_products(result, x, rows, [2, 1], [delta, delta], [indices] * 2, (3, 4))
    assert not result.any()


def test_a_set_of_adapters_is_found_once_and_what_is_written_to_is_seen(monkeypatch):
    """Where entries are is kept for a set; other positions or values count from the next call."""
    made = []
    places = native.Places
    monkeypatch.setattr(native, "Places", lambda gaps: made.append(len(gaps)) or places(gaps))
    torch.manual_seed(0)
    result, x, rows, counts, deltas, indices, shape = batch(
        (40, 50), [2, 3], 0.2, torch.float32, torch.float32
    )

    def check():
        got = ops.add_products(result.clone(), x, rows, counts, deltas, indices, shape)
        case = result, x, rows, counts, deltas, indices, shape
        check_against_the_reference(case, got, False)

    for _ in range(3):
        check()
    assert made == [2]
    deltas[1].mul_(2)
    check()
    deltas[0] = deltas[0].clone()
    check()
    deltas[0].data = torch.randn(800)[::2]  # k values, not in one piece
    check()
    deltas[0].data = deltas[0].double()
    check()
    assert made == [2]
    indices[1].copy_(random_indices(shape, 400, seed=7))
    check()
    indices[0].data = random_indices(shape, 400, seed=8)
    check()
    indices[0] = random_indices(shape, 400, seed=9)
    check()
    deltas[0] = deltas[0].float()
    deltas[0].untyped_storage().resize_(0)  # as FSDP lets memory go
    with pytest.raises(RuntimeError):
        check()


def test_sets_that_come_and_go_do_not_make_plans_anew(monkeypatch):
    made = []
    make_plan = plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda *args: made.append(args) or make_plan(*args))
    indices = [random_indices((40, 50), 400, seed=seed) for seed in range(12)]
    for last in range(1, 12):
        plan.places_of([indices[0], indices[last]], (40, 50))
    plan.places_of(indices, (40, 50))
    assert len(made) == 12
