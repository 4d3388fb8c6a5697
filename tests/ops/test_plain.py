# SPDX-License-Identifier: Apache-2.0
"""Derivatives beyond a backward pass: of second order, along a direction, of many at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from shira import ops
from shira.errors import AdapterError, SupportError
from shira.ops import plain
from shira.ops.gaps import pack

from . import reference
from .cases import random_indices, values

WIDE = torch.float64
IDS = torch.tensor([[0, 3, 3], [4, 2, 0]])


def linear(library, transposed=False):
    return lambda x, w, b, d, i: library.linear(x, w, b, d, i, transposed=transposed)


def convolution(library, **options):
    return lambda x, w, b, d, i: library.convolution(x, w, b, d, i, **options)


def embedding(library, padding_idx=None):
    if library is reference:
        padding_idx = -1 if padding_idx is None else padding_idx
    return lambda x, w, b, d, i: library.embedding(x, w, d, i, padding_idx=padding_idx)


def copied(library):
    return lambda x, w, b, d, i: x @ library.adapted_weight(w, d, i).t() + b


def sparse(library):
    return lambda x, w, b, d, i: sum(
        library.sparse_product(x, *each, (5, 6)) for each in zip(d, i, strict=True)
    )


# A way to compute and its options, the shape of the weight, the input.
CASES = {
    "linear": (linear, {}, (5, 6), torch.randn(3, 6)),
    "linear, transposed": (linear, {"transposed": True}, (6, 5), torch.randn(2, 3, 6)),
    "conv1d": (convolution, {"stride": 2, "padding": 1}, (5, 2, 3), torch.randn(2, 2, 7)),
    "conv2d": (
        *(convolution, {"groups": 5, "dilation": 2}, (5, 1, 2, 2)),
        torch.randn(2, 5, 4, 4),
    ),
    "conv3d": (convolution, {"padding": "same"}, (5, 1, 2, 1, 2), torch.randn(1, 1, 2, 2, 3)),
    "conv_transpose2d": (
        *(convolution, {"transposed": True, "stride": 2, "output_padding": 1}, (2, 5, 2, 1)),
        torch.randn(1, 2, 3, 2),
    ),
    "embedding": (embedding, {}, (5, 5), IDS),
    "embedding, padded": (embedding, {"padding_idx": 2}, (5, 5), IDS),
    "copy": (copied, {}, (5, 6), torch.randn(3, 6)),
    "sparse": (sparse, {}, (5, 6), torch.randn(3, 6)),
}


def case(name, dtype=WIDE, adapters=2):
    """A function of input, base weight, bias and deltas, its reference, and such tensors."""
    torch.manual_seed(0)
    kind, options, shape, x = CASES[name]
    x = x.to(dtype) if x.is_floating_point() else x
    weight, bias = torch.randn(shape).to(dtype), torch.randn(5).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    numel = weight.numel()
    deltas = [values(k, wide, k).detach() for k in (numel // 3, numel // 2)[:adapters]]
    indices = [random_indices(shape, len(delta), len(delta)) for delta in deltas]
    functions = []
    for library in (ops, reference):
        run = kind(library, **options)
        functions.append(lambda x, w, b, *deltas, run=run: run(x, w, b, deltas, indices))
    return *functions, (x, weight, bias, *deltas)


def leaves(name, tensors, which):
    """The tensors, those of some names as leaves that require grad."""
    names = ["x", "weight", "bias", *["delta"] * (len(tensors) - 3)]
    unused = {"embe": {"bias"}, "spar": {"weight", "bias"}}.get(name[:4], set())
    return [
        tensor.clone().requires_grad_(
            key in which and key not in unused and tensor.is_floating_point()
        )
        for key, tensor in zip(names, tensors, strict=True)
    ]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
# forward mode counts the padding's row in torch's embedding too, which gradcheck does not forgive
@pytest.mark.parametrize("name", [name for name in CASES if "padded" not in name])
def test_gradcheck_of_every_order_and_direction(name, adapters):
    function, _, tensors = case(name, adapters=adapters)
    for which in ({"delta"}, {"x"}, {"x", "weight", "bias", "delta"}):
        given = leaves(name, tensors, which)
        if any(tensor.requires_grad for tensor in given):
            assert gradcheck(function, given, check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(function, given, fast_mode=True)
    given = leaves(name, tensors, {"x", "delta"})
    assert gradgradcheck(function, given, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_as_the_fast_way(name, dtype):
    function, _, tensors = case(name, dtype)
    before = [tensor.clone() for tensor in tensors]
    want = function(*tensors)
    with forward_ad.dual_level():
        got = function(*tensors)
    assert got.dtype == want.dtype
    if name == "sparse":  # summed in another order
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("strided", [False, True])
def test_the_weight_to_the_bit(strided):
    weight = torch.randn(6, 5)
    weight[weight.abs() < 0.3] = -0.0
    weight = weight.t() if strided else weight.view(5, 6)
    deltas = [values(k, torch.float32, k).detach() for k in (0, 1, 12, 20)]
    indices = [random_indices((5, 6), len(delta), len(delta)) for delta in deltas]
    for count in (1, 2, 4):
        some = deltas[-count:], indices[-count:]
        got, want = plain.plain_weight(weight, *some), ops.adapted_weight(weight, *some)
        assert torch.equal(got, want)
        assert torch.equal(got.signbit(), want.signbit())
    packed = [pack(each, (5, 6)) for each in indices]
    assert torch.equal(plain.plain_weight(weight, deltas, packed), want)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_gradient(name):
    """As a gradient penalty takes them; through a product of two layers."""
    function, dense, tensors = case(name)
    got, want = [], []
    for run, result in ((function, got), (dense, want)):
        given = leaves(name, tensors, {"x", "weight", "bias", "delta"})
        wanted = [tensor for tensor in given if tensor.requires_grad]
        loss = run(*given).square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        penalty = sum(each.square().sum() for each in first)
        result += [*first, *torch.autograd.grad(penalty, wanted)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_one_delta_in_two_places():
    weight, x = torch.randn(4, 4, dtype=WIDE), torch.randn(3, 4, dtype=WIDE)
    v = values(5, WIDE)
    first, second = random_indices((4, 4), 5, 0), random_indices((4, 4), 5, 1)

    def penalty(function):
        y = function(x, weight, None, [v, v], [first, second])
        (found,) = torch.autograd.grad(y.pow(3).sum(), v, create_graph=True)
        return torch.autograd.grad(found.square().sum(), v)[0]

    torch.testing.assert_close(penalty(ops.linear), penalty(reference.linear))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_torch_func(name):
    function, dense, tensors = case(name)
    x, weight, bias, *deltas = tensors
    tangent = torch.randn_like(deltas[0])

    def loss(run):
        return lambda delta: run(x, weight, bias, delta, *deltas[1:]).square().mean()

    for transform in (
        grad,
        jacrev,
        jacfwd,
        hessian,
        lambda f: lambda d: grad(lambda e: grad(f)(e).square().sum())(d),
        lambda f: lambda d: jvp(f, (d,), (tangent,))[1],
        lambda f: lambda d: vjp(f, d)[1](torch.ones((), dtype=WIDE))[0],
        lambda f: lambda d: jvp(grad(f), (d,), (tangent,))[1],
        lambda f: lambda d: vmap(f)(torch.stack([d, d + tangent])),
        lambda f: lambda d: vmap(grad(f))(torch.stack([d, d + tangent])),
    ):
        ours = transform(loss(function))(deltas[0])
        theirs = transform(loss(dense))(deltas[0])
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_many_inputs_and_weights_at_once(name):
    function, _, tensors = case(name)
    x = tensors[0]
    many = [torch.stack([x, x.roll(1, 0)])]
    many += [torch.stack([tensor, tensor + 1]) for tensor in tensors[1:]]
    for batched in ({0}, {1}, {3}, {0, 3}, {0, 1, 2, 3, 4}):
        in_dims = tuple(0 if at in batched else None for at in range(len(tensors)))
        given = [many[at] if at in batched else tensors[at] for at in range(len(tensors))]
        got = vmap(function, in_dims)(*given)
        for at in range(2):
            one = [many[i][at] if i in batched else tensors[i] for i in range(len(tensors))]
            want = function(*one)
            torch.testing.assert_close(got[at] if got.dim() > want.dim() else got, want)


def test_many_adapters_with_positions_of_their_own():
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    deltas = torch.stack([values(7, torch.float32, seed).detach() for seed in range(4)])
    indices = torch.stack([random_indices((5, 6), 7, seed) for seed in range(4)])

    def one(delta, positions):
        return ops.linear(x, weight, None, [delta], [positions])

    got = vmap(one)(deltas, indices)
    want = torch.stack([one(*each) for each in zip(deltas, indices, strict=True)])
    torch.testing.assert_close(got, want)
    got = vmap(one, (0, 1))(deltas, indices.movedim(0, 1))
    torch.testing.assert_close(got, want)
    wrong = indices.clone()
    wrong[2, 1, 3] = 6
    with pytest.raises(SupportError, match="column 6 is outside"):
        vmap(one)(deltas, wrong)
    packed = torch.zeros(4, 7, dtype=torch.uint8)
    with pytest.raises(AdapterError, match="cannot be packed"):
        vmap(one)(deltas, packed)


def test_what_is_wrong_is_refused_here_too():
    x, weight, delta = torch.randn(3, 6), torch.randn(5, 6), torch.randn(2)
    twice = torch.tensor([[1, 1], [2, 2]])
    with pytest.raises(SupportError, match="twice"):
        grad(lambda d: ops.linear(x, weight, None, [d], [twice]).sum())(delta)
    good = torch.tensor([[1, 1], [2, 3]])
    with pytest.raises(AdapterError, match="2 positions need as many values, not 1"):
        grad(lambda d: ops.linear(x, weight, None, [d], [good]).sum())(delta[:1])


@pytest.mark.parametrize("kept", [False, True])
def test_only_the_input_is_differentiated(kept):
    """The input is not kept then; the gradient's gradient is that of the upstream one."""
    weight, v, i = torch.randn(5, 6, dtype=WIDE), values(7, WIDE), random_indices((5, 6), 7)
    x = torch.randn(3, 6, dtype=WIDE, requires_grad=True)
    v = v if kept else v.detach()
    upstream = torch.randn(3, 5, dtype=WIDE, requires_grad=True)
    got, want = [], []
    for function, result in ((ops.linear, got), (reference.linear, want)):
        y = function(x, weight, None, [v], [i])
        (dx,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        result += [dx, *torch.autograd.grad(dx.square().sum(), upstream)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast():
    weight, x = nn.Parameter(torch.randn(5, 6)), torch.randn(3, 6)
    v, i = values(7, torch.float32), random_indices((5, 6), 7)
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16()
        want = ops.linear(half, weight, None, [v], [i])
        got = vmap(lambda d: ops.linear(half, weight, None, [d], [i]))(v[None])[0]
        first = torch.autograd.grad(want.float().square().sum(), v, create_graph=True)[0]
    assert torch.equal(got, want)
    assert first.grad_fn is not None
    (second,) = torch.autograd.grad(first.square().sum(), v)
    assert second.isfinite().all()
    assert second.any()


def test_another_threads_adapter_is_not_read():
    """The copy waits for a product that is under way in the same weight."""
    import threading

    weight, x = torch.randn(64, 64), torch.randn(8, 64)
    v, i = values(2000, torch.float32).detach(), random_indices((64, 64), 2000)
    mine, j = torch.zeros(1), random_indices((64, 64), 1)
    want, wrong, over = nn.functional.linear(x, weight), [], threading.Event()

    def other():
        while not over.is_set():
            ops.linear(x, weight, None, [v], [i])

    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(200):
        got = vmap(lambda d: ops.linear(x, weight, None, [d], [j]))(mine[None])[0]
        if not torch.equal(got, want):
            wrong.append(1)
    over.set()
    thread.join()
    assert not wrong


@pytest.mark.parametrize("transform", [grad, jacfwd, lambda f: lambda d: vmap(f)(d[None])])
def test_inside_compiled_code(transform):
    """The graph breaks around them; what is compiled without them has no break."""
    torch._dynamo.reset()
    weight, x = torch.randn(5, 6), torch.randn(3, 6)
    v, i = values(4, torch.float32).detach(), random_indices((5, 6), 4)

    def run(delta):
        return transform(lambda d: ops.linear(x, weight, None, [d], [i]).square().sum())(delta)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(v), run(v))
