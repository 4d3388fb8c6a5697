# SPDX-License-Identifier: Apache-2.0
"""`shira::sparse_product`, `add_products` and `looked_up` against the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops
from shira.errors import AdapterError, SupportError
from shira.ops import native

from . import reference
from .cases import close, kernels_of, needs_kernels, random_indices, torch_threads, values

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equals_reference(data):
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    transposed, strided = data.draw(st.booleans()), data.draw(st.booleans())
    dtype, wide = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    tokens = data.draw(st.sampled_from([0, 1, 2, 7]))
    k = data.draw(st.sampled_from([0, 1, rows * cols // 2, rows * cols]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    x = torch.randn(fan_in, tokens).t() if strided else torch.randn(tokens, fan_in)
    x = x.to(dtype).requires_grad_()
    delta, indices = values(k, wide), random_indices((rows, cols), k)
    grad = torch.randn(tokens, fan_out)

    def run(function):
        y = function(x, delta, indices, (rows, cols), transposed=transposed)
        return [y, *torch.autograd.grad(y, [x, delta], grad.to(y.dtype))]

    for ours, theirs in zip(run(ops.sparse_product), run(reference.sparse_product), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        narrow = ours.dtype if ours.dtype in (torch.bfloat16, torch.float16) else torch.float32
        assert close(ours, theirs, torch.float64 if ours.dtype == torch.float64 else narrow)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    x = torch.randn(3, 5 if transposed else 6, dtype=torch.float64, requires_grad=True)
    delta, indices = values(7, torch.float64), random_indices((5, 6), 7)
    function = lambda x, d: ops.sparse_product(x, d, indices, (5, 6), transposed=transposed)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, delta))
    assert torch.autograd.gradgradcheck(lambda x: function(x, delta.detach()), (x,))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_op_is_one_to_torch(transposed):
    x = torch.randn(3, 5 if transposed else 6, requires_grad=True)
    delta, indices = values(7, torch.float32), random_indices((5, 6), 7)
    torch.library.opcheck(
        torch.ops.shira.sparse_product.default, (x, delta, indices, [5, 6], transposed)
    )
    torch.library.opcheck(
        torch.ops.shira.sampled_product.default,
        (torch.randn(3, 5), torch.randn(3, 6), indices, [5, 6], 7),
    )


def test_positions_written_anew_are_seen():
    """The order by columns is kept; it must not outlive the positions it was made from."""
    x, delta = torch.randn(3, 5), values(4, torch.float32).detach()
    indices = random_indices((5, 6), 4, seed=1)
    for seed in (1, 2):
        indices.copy_(random_indices((5, 6), 4, seed=seed))
        got = ops.sparse_product(x, delta, indices, (5, 6), transposed=True)
        assert close(
            got, reference.sparse_product(x, delta, indices, (5, 6), transposed=True), torch.float32
        )


def test_wrong_positions_are_refused():
    x, delta = torch.randn(3, 6), torch.randn(2)
    with pytest.raises(SupportError, match="row 5"):
        ops.sparse_product(x, delta, torch.tensor([[0, 5], [1, 1]]), (5, 6))
    with pytest.raises(SupportError, match="column 6"):
        ops.looked_up(torch.tensor([0]), torch.tensor([[0, 1], [1, 6]]), (5, 6))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_looked_up_meets_each_entry_of_the_rows(data):
    rows, cols = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    k = data.draw(st.integers(0, rows * cols))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), dtype=torch.long)
    indices = random_indices((rows, cols), k)
    place, entry = ops.looked_up(ids, indices, (rows, cols))
    assert place.unique().numel() == place.numel()
    got = torch.full((len(ids) * cols,), -1)
    got[place] = entry
    numbered = torch.full((rows, cols), -1)
    numbered[indices[0].long(), indices[1].long()] = torch.arange(k)
    assert torch.equal(got.view(-1, cols), numbered[ids].view(-1, cols))


SETS = ["base", "avx2", "avx512"]
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def batch(shape, counts, density, dtype, kind, transposed=False, extra=3):
    """Result, x, rows, counts, deltas, indices, shape: rows in random order, some of no group."""
    fan_in, fan_out = shape if transposed else shape[::-1]
    tokens = sum(counts) + extra
    k = round(shape[0] * shape[1] * density)
    return (
        torch.randn(tokens, fan_out).to(dtype),
        torch.randn(tokens, fan_in).to(dtype),
        torch.randperm(tokens)[: sum(counts)],
        counts,
        [torch.randn(k).to(kind) for _ in counts],
        [random_indices(shape, k, seed=i) for i in range(len(counts))],
        shape,
    )


def with_kernels(kernels, case, transposed=False):
    result, x, rows, counts, deltas, indices, shape = case
    plans = [ops.make_plan([index], shape, (shape[1], 1)) for index in indices]
    groups = zip(counts, [plan.gaps for plan in plans], deltas, strict=True)
    result = result.clone()
    kernels.add_products(result, x, rows, groups, shape, transposed)
    return result


def check_against_the_reference(case, got, transposed):
    """Within the rounding of the sum and one of the result; rows of no group bit for bit."""
    result, x, rows, counts, deltas, indices, shape = case
    sums, size = result.double(), result.double().abs()
    for at, delta, index in zip(rows.split(counts), deltas, indices, strict=True):
        args = index, shape, transposed
        sums[at] += reference.sparse_product(x[at].double(), delta.double(), *args)
        size[at] += reference.sparse_product(x[at].double().abs(), delta.double().abs(), *args)
    unit = torch.finfo(result.dtype).eps / 2
    assert ((got.double() - sums).abs() <= unit * sums.abs() + 64 * 2**-24 * size + 1e-7).all()
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(got[rest], result[rest])


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
