# SPDX-License-Identifier: Apache-2.0
"""Products with adapters in the weight against the dense reference; what they promise of it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops
from shira.errors import AdapterError, ConfigError, SupportError
from shira.masks import random_support

from . import reference
from .cases import close, random_indices, values

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(function, x, weight, bias, deltas, indices, transposed, grad):
    """Output and every gradient."""
    leaves = [x, *([bias] if bias is not None else []), *deltas]
    y = function(x, weight, bias, deltas, indices, transposed=transposed)
    return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype).expand_as(y))]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equals_reference(data):
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    numel = rows * cols
    adapters = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    transposed = data.draw(st.booleans())
    strided = data.draw(st.booleans())
    batch = data.draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3)]))
    counts = [data.draw(st.sampled_from([0, 1, numel // 2, numel])) for _ in range(adapters)]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(cols, rows).t() if strided else torch.randn(rows, cols)
    weight = weight.to(dtype)
    before = weight.clone()
    fan_in, fan_out = (rows, cols) if transposed else (cols, rows)
    x = torch.randn(*batch, fan_in).to(dtype).requires_grad_()
    bias = torch.randn(fan_out).to(dtype).requires_grad_() if data.draw(st.booleans()) else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deltas = [values(k, wide, seed=i) for i, k in enumerate(counts)]
    indices = [random_indices((rows, cols), k, seed=i) for i, k in enumerate(counts)]
    grad = torch.randn(fan_out)
    got = run(ops.linear, x, weight, bias, deltas, indices, transposed, grad)
    want = run(reference.linear, x, weight, bias, deltas, indices, transposed, grad)
    assert torch.equal(weight, before)
    if not strided and batch:  # the same kernel on the same layout: the merged weight's own product
        assert torch.equal(got[0], want[0])
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert close(ours, theirs, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [[7], [7, 11]])
def test_gradcheck(transposed, counts):
    shape = (5, 6)
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(3, 5 if transposed else 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6 if transposed else 5, dtype=torch.float64, requires_grad=True)
    deltas = [values(k, torch.float64, seed=k) for k in counts]
    indices = [random_indices(shape, k, seed=k) for k in counts]
    assert torch.autograd.gradcheck(
        lambda x, bias, *d: ops.linear(x, weight, bias, d, indices, transposed=transposed),
        (x, bias, *deltas),
    )


def test_the_op_is_pure_as_torch_sees_it():
    weight, x = torch.randn(5, 6), torch.randn(3, 6, requires_grad=True)
    v, i = values(4, torch.float32), random_indices((5, 6), 4)
    torch.library.opcheck(torch.ops.shira.linear.default, (x, weight, None, [v], [i], False))
    torch.library.opcheck(
        torch.ops.shira.linear_backward.default,
        (torch.randn(3, 5), x.detach(), weight, [v.detach()], [i], False, [True, False, True]),
    )


def test_a_weight_that_requires_grad_gets_its_dense_gradient():
    weight = torch.randn(5, 6, requires_grad=True)
    x, v, i = torch.randn(3, 6), values(4, torch.float32), random_indices((5, 6), 4)
    got = torch.autograd.grad(ops.linear(x, weight, None, [v], [i]).square().sum(), [weight, v])
    y = reference.linear(x, weight, None, [v], [i])
    want = torch.autograd.grad(y.square().sum(), [weight, v])
    assert all(close(a, b, torch.float32) for a, b in zip(got, want, strict=True))


def test_nothing_is_written_on_failure():
    weight, before = torch.randn(5, 6), None
    before = weight.clone()
    v, i = values(4, torch.float32), random_indices((5, 6), 4)
    with pytest.raises(RuntimeError):
        ops.linear(torch.randn(3, 7), weight, None, [v], [i])
    assert torch.equal(weight, before)
    y = ops.linear(torch.randn(3, 6, requires_grad=True), weight, None, [v], [i])

    def explode(_):
        raise KeyError("in the middle of backward")

    y.register_hook(explode)
    with pytest.raises(KeyError):
        y.sum().backward()
    assert torch.equal(weight, before)


def test_two_graphs_on_one_weight_and_values_read_at_use():
    weight, x = torch.randn(5, 6), torch.randn(3, 6, requires_grad=True)
    v, i = values(4, torch.float32), random_indices((5, 6), 4)
    one = ops.linear(x, weight, None, [v], [i]).sum()
    two = F.linear(x, weight).sum()
    three = ops.linear(x, weight, None, [v * 2], [i]).sum()
    (one + two + three).backward()
    want_x, want_v = torch.autograd.grad(
        reference.linear(x, weight, None, [v], [i]).sum()
        + F.linear(x, weight).sum()
        + reference.linear(x, weight, None, [v * 2], [i]).sum(),
        [x, v],
    )
    assert close(x.grad, want_x, torch.float32)
    assert close(v.grad, want_v, torch.float32)
    v.data.mul_(-3)  # no version bump
    assert torch.equal(
        ops.linear(x, weight, None, [v], [i]), reference.linear(x, weight, None, [v], [i])
    )


def test_indices_written_in_place_are_noticed():
    weight, x = torch.randn(5, 6), torch.randn(3, 6)
    v, i = values(4, torch.float32), random_indices((5, 6), 4)
    ops.linear(x, weight, None, [v], [i])
    i.copy_(random_indices((5, 6), 4, seed=1))
    assert torch.equal(
        ops.linear(x, weight, None, [v], [i]), reference.linear(x, weight, None, [v], [i])
    )


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (torch.tensor([[0, 5], [0, 0]]), "outside"),
        (torch.tensor([[-1, 0], [0, 0]]), "outside"),
        (torch.tensor([[1, 0], [0, 0]]), "before"),
        (torch.tensor([[1, 1], [2, 2]]), "twice"),
    ],
)
def test_bad_indices_are_refused_before_anything_is_written(bad, word):
    weight = torch.randn(5, 6)
    before = weight.clone()
    with pytest.raises(SupportError, match=word):
        ops.linear(torch.randn(3, 6), weight, None, [values(2, torch.float32)], [bad.int()])
    assert torch.equal(weight, before)


def test_a_cast_product_is_that_of_the_merged_weight_cast():
    weight, v, i = torch.randn(5, 6), values(9, torch.float32), random_indices((5, 6), 9)
    x = torch.randn(3, 6).bfloat16()
    merged = reference.adapted_weight(weight, [v], [i]).bfloat16()
    assert torch.equal(ops.linear(x, weight, None, [v], [i]), F.linear(x, merged))


def test_an_expanded_weight_is_not_written():
    zeros = torch.zeros(()).expand(5, 6)
    v, i = values(9, torch.float32), random_indices((5, 6), 9)
    x = torch.randn(3, 6)
    dense = reference.scatter(torch.zeros(5, 6), i[0].long() * 6 + i[1], v)
    assert torch.equal(ops.linear(x, zeros, None, [v], [i]), F.linear(x, dense))
    assert not zeros.any()


def test_inference_mode():
    with torch.inference_mode():
        weight, x = torch.randn(5, 6), torch.randn(3, 6)
        v, i = values(4, torch.float32).detach(), random_indices((5, 6), 4)
        got = ops.linear(x, weight, None, [v], [i])
    outside = torch.randn(5, 6)
    with torch.inference_mode():
        again = ops.linear(x, outside, None, [v], [i])
    assert torch.equal(got, reference.linear(x, weight, None, [v], [i]))
    assert torch.equal(again, reference.linear(x, outside, None, [v], [i]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and through torch
def test_weight_made_in_inference_mode_outside_of_it(dtype):
    with torch.inference_mode():
        weight = torch.randn(5, 6, dtype=dtype)
    x, before = torch.randn(3, 6, dtype=dtype), weight.clone()
    v, i = values(4, dtype).detach(), random_indices((5, 6), 4)
    got = ops.linear(x, weight, None, [v], [i])
    assert torch.equal(got, reference.linear(x, weight, None, [v], [i]))
    assert torch.equal(weight, before)


def test_threads_do_not_interleave_on_one_weight():
    weight = torch.randn(64, 64)
    before = weight.clone()
    x = torch.randn(8, 64)
    adapters = [
        (values(500, torch.float32, s).detach(), random_indices((64, 64), 500, s)) for s in (1, 2)
    ]
    want = [reference.linear(x, weight, None, [v], [i]) for v, i in adapters]
    wrong = []

    def work(number):
        v, i = adapters[number]
        for _ in range(200):
            if not torch.equal(ops.linear(x, weight, None, [v], [i]), want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(weight, before)


def test_backward_keeps_no_more_than_input_and_values():
    """What autograd saves: the input, the values, the positions, and the weight itself."""
    weight = torch.randn(64, 64)
    x = torch.randn(8, 64, requires_grad=True)
    v, i = values(100, torch.float32), random_indices((64, 64), 100)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear(x, weight, None, [v], [i])
    own = {t.data_ptr() for t in (weight, x, v, i)}
    assert all(t.data_ptr() in own for t in saved)


def test_compiles_without_a_break():
    weight, x = torch.randn(5, 6), torch.randn(3, 6, requires_grad=True)
    before = weight.clone()
    v, i = values(4, torch.float32), random_indices((5, 6), 4)
    compiled = torch.compile(
        lambda x, v: ops.linear(torch.relu(x), weight, None, [v], [i]).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    got = torch.autograd.grad(compiled(x, v), [x, v])
    want = torch.autograd.grad(
        reference.linear(torch.relu(x), weight, None, [v], [i]).square().sum(), [x, v]
    )
    assert all(close(a, b, torch.float32) for a, b in zip(got, want, strict=True))
    assert torch.equal(weight, before)


def test_indices_written_between_forward_and_backward_are_noticed():
    weight, x = torch.randn(5, 6), torch.randn(3, 6)
    v, i = values(4, torch.float32), random_indices((5, 6), 4)
    y = ops.linear(x, weight, None, [v], [i])
    i.copy_(random_indices((5, 6), 4, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_may_come_back_as_copies_of_another_layout():
    weight = torch.randn(6, 5).t()
    leaves = [torch.randn(3, 6, requires_grad=True), values(4, torch.float32)]
    i, other = random_indices((5, 6), 4), random_indices((5, 6), 9, seed=1)
    more = values(9, torch.float32)
    for deltas, indices in (([leaves[1]], [i]), ([leaves[1], more], [i, other])):
        want = torch.autograd.grad(
            reference.linear(leaves[0], weight, None, deltas, indices).square().sum(), leaves
        )
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
        ):
            y = ops.linear(leaves[0], weight, None, deltas, indices)
        got = torch.autograd.grad(y.square().sum(), leaves)
        assert all(close(a, b, torch.float32) for a, b in zip(got, want, strict=True))


def test_plans_die_with_their_indices():
    import gc
    import weakref

    weight, x, v = torch.randn(5, 6), torch.randn(3, 6), values(4, torch.float32)
    i, j = random_indices((5, 6), 4), random_indices((5, 6), 4, seed=1)
    ops.linear(x, weight, None, [v], [i])
    ops.linear(x, weight, None, [v, v], [i, j])
    gone = [weakref.ref(i), weakref.ref(j)]
    del i, j
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_convolution_equals_reference(data):
    """Every option, against torch's own function on the merged weight: the same bits."""
    dims, transposed = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    dtype, groups = data.draw(st.sampled_from(DTYPES[:3])), data.draw(st.sampled_from([1, 2]))
    per_size = st.lists(st.integers(1, 2), min_size=dims, max_size=dims)
    stride, dilation, kernel = data.draw(per_size), data.draw(per_size), data.draw(per_size)
    padding = data.draw(st.lists(st.integers(0, 1), min_size=dims, max_size=dims))
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    if transposed:
        options["output_padding"] = [min(s - 1, 1) for s in stride]
    elif data.draw(st.booleans()):
        options |= {"padding": data.draw(st.sampled_from(["same", "valid"])), "stride": 1}
    channels = (4, 3 * groups) if not transposed else (3 * groups, 4)
    shape = (channels[0], channels[1] // groups, *kernel)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(shape).to(dtype)
    if dims > 1 and data.draw(st.booleans()):
        format = torch.channels_last if dims == 2 else torch.channels_last_3d
        weight = weight.contiguous(memory_format=format)
    before = weight.clone()
    batch = data.draw(st.sampled_from([(), (1,), (2,)]))
    x = torch.randn(*batch, 3 * groups, *(5, 4, 6)[:dims]).to(dtype).requires_grad_()
    bias = torch.randn(4).to(dtype).requires_grad_() if data.draw(st.booleans()) else None
    numel = weight.numel()
    counts = data.draw(st.lists(st.sampled_from([0, 1, numel // 2, numel]), min_size=1, max_size=2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    deltas = [values(k, wide, k) for k in counts]
    indices = [random_indices(shape, k, k) for k in counts]
    arguments = x, weight, bias, deltas, indices
    y = ops.convolution(*arguments, transposed=transposed, **options)
    want = reference.convolution(*arguments, transposed=transposed, **options)
    assert torch.equal(y, want)
    assert y.dtype == want.dtype
    assert torch.equal(weight, before)
    assert weight.stride() == before.stride()
    leaves = [x, *([] if bias is None else [bias]), *deltas]
    grad = torch.randn(y.shape).to(dtype)
    got_grads = torch.autograd.grad(y, leaves, grad)
    want_grads = torch.autograd.grad(want, leaves, grad)
    assert all(close(a, b, dtype) for a, b in zip(got_grads, want_grads, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_gradcheck_and_opcheck(dims, transposed):
    weight = torch.randn(2, 2, *(2, 1, 2)[:dims], dtype=torch.float64)
    x = torch.randn(1, 4, *(3, 2, 2)[:dims], dtype=torch.float64, requires_grad=True)
    x = x if not transposed else x[:, :2].detach().requires_grad_()
    v, i = values(3, torch.float64), random_indices(weight.shape, 3)
    groups = 1 if transposed else 2
    assert torch.autograd.gradcheck(
        lambda x, v: ops.convolution(
            x, weight, None, [v], [i], stride=2, padding=1, transposed=transposed, groups=groups
        ),
        (x, v),
    )
    options = [2] * dims, [1] * dims, [1] * dims, transposed, [0] * dims, groups
    arguments = (x, weight, None, [v], [i], *options)
    torch.library.opcheck(torch.ops.shira.convolution.default, arguments)


def test_convolution_refuses_what_is_no_padding():
    x, weight, v = torch.randn(1, 2, 5), torch.randn(2, 2, 2), values(1, torch.float32)
    i = random_indices(weight.shape, 1)
    for options in ({"padding": "full"}, {"padding": "same", "stride": 2}):
        with pytest.raises(ConfigError, match="padding is a number"):
            ops.convolution(x, weight, None, [v], [i], **options)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 8),
    cols=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    shape=st.sampled_from([(), (0,), (4,), (2, 3)]),
    dtype=st.sampled_from(DTYPES[:3]),
    padded=st.booleans(),
)
def test_embedding_equals_reference(rows, cols, share, shape, dtype, padded):
    k = round(rows * cols * share)
    weight = torch.randn(rows, cols).to(dtype)
    before = weight.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    v, i = values(k, wide), random_indices((rows, cols), k)
    ids = torch.randint(rows, shape)
    padding = 0 if padded else None
    y = ops.embedding(ids, weight, [v], [i], padding_idx=padding)
    want = reference.embedding(ids, weight, [v], [i], -1 if padding is None else padding)
    assert torch.equal(y, want)
    assert torch.equal(weight, before)
    grad = torch.randn(y.shape).to(dtype)
    got = torch.autograd.grad(y, v, grad)[0]
    assert close(got, torch.autograd.grad(want, v, grad)[0], dtype)


def test_embedding_gradcheck_and_opcheck():
    weight = torch.randn(5, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 3], [4, 2, 0]])
    v, i = values(9, torch.float64), random_indices((5, 4), 9)
    assert torch.autograd.gradcheck(lambda v: ops.embedding(ids, weight, [v], [i]), (v,))
    torch.library.opcheck(torch.ops.shira.embedding.default, (ids, weight, None, [v], [i], -1))


def case(shape, dtype, adapters=2):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    numel = weight.numel()
    supports = [random_support(shape, numel // 4, seed=seed) for seed in range(adapters)]
    deltas = [torch.randn(numel // 4, generator=generator).requires_grad_() for _ in supports]
    return weight, deltas, supports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (4, 3, 2, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "turned"])
def test_value_and_gradient(shape, dtype, layout):
    weight, deltas, supports = case(shape, dtype)
    if layout == "turned":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    weight.requires_grad_()
    before = weight.detach().clone()
    got = ops.adapted_weight(weight, deltas, [s.coordinates() for s in supports])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    total = torch.zeros(weight.numel())
    for support, delta in zip(supports, deltas, strict=True):
        total.index_add_(0, support.indices.long(), delta.detach())
    want = (weight.detach().to(wide) + total.view(shape).to(wide)).to(dtype)
    assert torch.equal(got, want)
    assert torch.equal(weight, before)
    assert got.data_ptr() != weight.data_ptr()
    grad = torch.randn(shape).to(dtype)
    got.backward(grad)
    assert torch.equal(weight.grad, grad)
    for support, delta in zip(supports, deltas, strict=True):
        assert torch.equal(delta.grad, grad.reshape(-1)[support.indices.long()].float())


def test_the_ops_rules():
    weight, deltas, supports = case((6, 8), torch.float32)
    indices = [support.coordinates() for support in supports]
    torch.library.opcheck(torch.ops.shira.adapted_weight, (weight, deltas, indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled, and through torch
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_delta_of_another_length_is_refused(dtype, adapters):
    weight, x = torch.randn(5, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    before, indices = weight.clone(), [random_indices((5, 6), 4)] * adapters
    deltas = [torch.zeros(4, dtype=dtype)] * (adapters - 1)
    with pytest.raises(AdapterError, match="4 positions need as many values, not 1"):
        ops.linear(x, weight, None, [torch.ones(1, dtype=dtype), *deltas], indices)
    assert torch.equal(weight, before)


def test_a_padding_row_counts_from_the_end_as_in_torch():
    ids, table, indices = torch.tensor([3, 1, 3]), torch.randn(4, 2), torch.tensor([[1, 3], [0, 1]])
    for padding in (-1, -4, 3):
        delta, weight = torch.zeros(2, requires_grad=True), table.clone().requires_grad_()
        ops.embedding(ids, table, [delta], [indices], padding_idx=padding).sum().backward()
        F.embedding(ids, weight, padding).sum().backward()
        assert torch.equal(delta.grad, weight.grad[indices[0], indices[1]])
    for padding in (-5, 4):
        with pytest.raises(ConfigError, match=f"one of the 4 rows, not {padding}"):
            ops.embedding(ids, table, [delta], [indices], padding_idx=padding)
