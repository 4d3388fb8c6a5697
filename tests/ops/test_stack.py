# SPDX-License-Identifier: Apache-2.0
"""Products with a stack of matrices, against plain torch on the adapted stack."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from shira import Support, ops

E, OUT, IN = 4, 8, 16


def case(dtype=torch.float32, per_expert=(5, 0, 1, 9), seed=0, transposed=True):
    """A stack, two deltas and their indices; some matrices have one entry or none."""
    generator = torch.Generator().manual_seed(seed)
    shape = (E, OUT, IN) if transposed else (E, IN, OUT)
    weight = torch.randn(shape, generator=generator).to(dtype)
    deltas, indices = [], []
    for _ in range(2):
        flat = [
            at * OUT * IN + torch.randperm(OUT * IN, generator=generator)[:k].sort().values
            for at, k in enumerate(per_expert)
        ]
        support = Support(shape, torch.cat(flat))
        indices.append(support.coordinates())
        deltas.append(torch.randn(support.nnz, generator=generator).requires_grad_())
    return weight, deltas, indices


def adapted(weight, deltas, indices):
    total = torch.zeros(weight.numel())
    for delta, positions in zip(deltas, indices, strict=True):
        support = Support.from_coordinates(weight.shape, positions)
        total = total.index_add(0, support.indices.long(), delta)
    return (weight.float() + total.view(weight.shape)).to(weight.dtype)


def loop(x, stack, offs):
    """``grouped_mm`` in any dtype."""
    parts = zip([0, *offs.tolist()], offs.tolist(), stack, strict=False)
    return torch.cat([x[first:last] @ matrix for first, last, matrix in parts])


def rows_of(offs):
    ends = [0, *offs.tolist()]
    return lambda: list(pairwise(ends))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("sizes", [(3, 2, 4, 1), (0, 5, 0, 5), (10, 0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", ["loop", "grouped_mm"])
def test_in_groups_of_rows(count, transposed, sizes, dtype, product, way):
    if product == "grouped_mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    weight, deltas, indices = case(dtype, transposed=transposed)
    deltas, indices = deltas[:count], indices[:count]
    before = weight.clone()
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    of = (
        (lambda x, w: F.grouped_mm(x, w, offs=offs))
        if product == "grouped_mm"
        else (lambda x, w: loop(x, w, offs))
    )
    x = torch.randn(10, IN).to(dtype).requires_grad_()
    got = ops.grouped(of, x, weight, deltas, indices, rows_of(offs), transposed=transposed)
    stack = adapted(weight, deltas, indices)
    want = of(x, stack.mT if transposed else stack)
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    found = torch.autograd.grad(got, [x, *deltas], grad)
    expected = torch.autograd.grad(want, [x, *deltas], grad)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert torch.equal(weight, before)


def test_as_many_matrices_as_the_stack():
    weight, deltas, indices = case(transposed=False)
    x = torch.randn(E, 3, IN, requires_grad=True)
    ends = [at * 3 for at in range(E + 1)]
    rows = list(pairwise(ends))
    got = ops.grouped(torch.bmm, x, weight, deltas, indices, lambda: rows, transposed=False)
    want = torch.bmm(x, adapted(weight, deltas, indices))
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, [x, *deltas], grad),
        torch.autograd.grad(want, [x, *deltas], grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_gradients_in_double_precision():
    weight, deltas, indices = case(torch.float64)
    deltas = [delta.detach().double().requires_grad_() for delta in deltas]
    x = torch.randn(10, IN, dtype=torch.float64, requires_grad=True)
    offs = torch.tensor([3, 3, 8, 10])

    def compute(x, *deltas):
        of = lambda x, w: loop(x, w, offs)  # noqa: E731
        return ops.grouped(of, x, weight, deltas, indices, rows_of(offs), transposed=True)

    torch.autograd.gradcheck(compute, (x, *deltas))


def test_rows_are_not_asked_for_where_nothing_trains():
    weight, deltas, indices = case()
    deltas = [delta.detach() for delta in deltas]
    offs = torch.tensor([3, 3, 8, 10])
    x = torch.randn(10, IN, requires_grad=True)
    result = ops.grouped(
        lambda x, w: loop(x, w, offs), x, weight, deltas, indices, pytest.fail, transposed=True
    )
    result.sum().backward()
    want = loop(x.detach().requires_grad_(), adapted(weight, deltas, indices).mT, offs)
    assert torch.equal(result, want)


def test_a_weight_of_other_strides():
    weight, deltas, indices = case()
    other = weight.mT.contiguous().mT
    offs = torch.tensor([3, 3, 8, 10])
    x = torch.randn(10, IN)
    results = [
        ops.grouped(
            lambda x, w: loop(x, w, offs), x, one, deltas, indices, rows_of(offs), transposed=True
        )
        for one in (weight, other)
    ]
    torch.testing.assert_close(*results)
    for result in results:
        gradients = torch.autograd.grad(result.sum(), deltas)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_pieces_are_the_entries_of_each_matrix(way):
    weight, _, (indices, _) = case()
    plan = ops.plan_for([indices], weight.shape, weight.stride())
    pieces = ops.pieces_of(plan)
    assert pieces.sizes == [5, 0, 1, 9]
    from shira.ops.gaps import support_of

    flat = [
        support_of(one, (OUT, IN)).indices.long() + at * OUT * IN
        for at, one in enumerate(pieces.indices)
    ]
    assert torch.equal(
        torch.cat(flat), Support.from_coordinates(weight.shape, indices).indices.long()
    )
    assert ops.pieces_of(plan) is pieces


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("product", ["loop", "bmm"])
def test_gradients_of_a_gradient(product, trained):
    weight, deltas, indices = case(transposed=True)
    deltas = deltas if trained else [delta.detach() for delta in deltas]
    offs = torch.tensor([3, 6, 9, 12])
    x = torch.randn(E * 3, IN)
    if product == "bmm":
        of, x = torch.bmm, x.view(E, 3, IN)
    else:
        of = lambda x, w: loop(x, w, offs)  # noqa: E731
    x.requires_grad_()
    upstream = torch.randn(*x.shape[:-1], OUT, requires_grad=True)
    wanted = [x, *deltas] if trained else [x]
    answers = []
    for run in (
        lambda: ops.grouped(of, x, weight, deltas, indices, rows_of(offs), transposed=True),
        lambda: of(x, adapted(weight, deltas, indices).mT),
    ):
        first = torch.autograd.grad(run(), wanted, upstream, create_graph=True)
        penalty = sum(each.square().sum() for each in first)
        second = torch.autograd.grad(penalty, [*(wanted if trained else ()), upstream])
        answers.append([*first, *second])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)
