# SPDX-License-Identifier: Apache-2.0
"""`shira::sparse_product` and `looked_up` against the dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shira import ops
from shira.errors import SupportError

from . import reference
from .cases import close, random_indices, values

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
