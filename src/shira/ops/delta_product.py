# SPDX-License-Identifier: Apache-2.0
"""``shira::sparse_product``: a matrix product with an adapter's delta alone, the weight left out.

For batches whose samples want different adapters (`shira.ops.mixed_batch`): the base product is
made once for all, and each group of samples adds its own ``x_g dW_g^T``, 2 * tokens of the group *
k operations instead of a product with the whole weight. By torch's sparse product of compressed
rows (MKL, cuSPARSE).

The sum ``x W^T + x dW^T`` is not the merged weight's product bit for bit: it is summed in another
order, and in bfloat16 and float16 the delta is not rounded with the weight (so it is the nearer
one to the sum without rounding). In float32 and float64 the two differ by rounding noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.ops.gradient import silence_csr_warning, weight_gradient
from shira.ops.plain import plain_weight, transforming
from shira.ops.plan import Pattern, Plan, pattern_of, plan_for
from shira.ops.product import no_autocast


@torch.library.custom_op(
    "shira::sparse_product",
    mutates_args=(),
    schema="(Tensor x, Tensor delta, Tensor indices, int[] shape, bool transposed) -> Tensor",
)
def _sparse_product(
    x: Tensor, delta: Tensor, indices: Tensor, shape: Sequence[int], transposed: bool
) -> Tensor:
    wide = accumulation_dtype(x.dtype, delta.dtype)
    rows, cols = shape
    tokens, out = x.shape[0], cols if transposed else rows
    if not tokens or not delta.numel():
        return x.new_zeros((tokens, out), dtype=wide)
    plan = plan_for([indices], (rows, cols), (cols, 1))
    with no_autocast(x):
        if transposed:
            crow, col, order = columns_of(plan)
            values, size = delta.index_select(0, order), (cols, rows)
        else:
            (crow, _, col), values, size = rows_of(plan), delta, (rows, cols)
        silence_csr_warning()
        matrix = torch.sparse_csr_tensor(crow, col, values.to(wide), size, check_invariants=False)
        result: Tensor = torch.mm(matrix, x.to(wide).t()).t()  # (out, tokens), seen turned
        return result.contiguous()


@torch.library.custom_op(
    "shira::sampled_product",
    mutates_args=(),
    schema="(Tensor left, Tensor right, Tensor indices, int[] shape, int count) -> Tensor",
)
def _sampled_product(
    left: Tensor, right: Tensor, indices: Tensor, shape: Sequence[int], count: int
) -> Tensor:
    with no_autocast(left):
        dtype = torch.promote_types(left.dtype, right.dtype)
        plan = plan_for([indices], tuple(shape), (shape[1], 1))
        return weight_gradient(left.to(dtype), right.to(dtype), plan)


def sparse_product(
    x: Tensor,
    delta: Tensor,
    indices: Tensor,
    shape: Sequence[int],
    *,
    transposed: bool = False,
) -> Tensor:
    """Compute ``x dW^T``, dW the matrix that is ``delta`` at its positions and zero elsewhere.

    Args:
        x: ``(tokens, in)``, floating.
        delta: ``(k,)``, scale included; any floating dtype.
        indices: int32 ``(2, k)``: rows and columns of dW, sorted; or packed.
        shape: Of dW: ``(out, in)``, or ``(in, out)`` if ``transposed``.
        transposed: dW is stored ``(in, out)``: the product is ``x dW``.

    Returns:
        ``(tokens, out)`` in float32 (float64 if ``x`` or ``delta`` are), differentiable in ``x``
        and ``delta``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.

    Example:
        >>> indices = torch.tensor([[0, 1], [2, 0]])
        >>> shira.ops.sparse_product(torch.ones(1, 3), torch.tensor([5.0, 7.0]), indices, (2, 3))
        tensor([[5., 7.]])
    """
    if transforming():
        wide = accumulation_dtype(x.dtype, delta.dtype)
        nothing = torch.zeros(shape, dtype=wide, device=x.device)
        dense = plain_weight(nothing, [delta], [indices])
        with no_autocast(x):
            return x.to(wide) @ (dense if transposed else dense.t())
    result: Tensor = torch.ops.shira.sparse_product(x, delta, indices, list(shape), transposed)
    return result


def looked_up(ids: Tensor, indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the entries of a delta that a table look-up meets: O(tokens * k / rows), not O(k).

    Args:
        ids: ``(tokens,)`` integers, rows of the table.
        indices: int32 ``(2, k)``: rows and columns of the table, sorted; or packed.
        shape: Of the table, ``(rows, dim)``.

    Returns:
        int64 ``(hits,)`` twice: the place in the flattened ``(tokens, dim)`` result, and which of
        the k entries stands there. Places are distinct.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.

    Example:
        >>> indices = torch.tensor([[0, 2], [1, 0]])
        >>> places, entries = shira.ops.looked_up(torch.tensor([2, 1]), indices, (3, 2))
        >>> places.tolist(), entries.tolist()
        ([0], [1])
    """
    plan = plan_for([indices], tuple(shape), (shape[1], 1))
    crow, _, col = rows_of(plan)
    first = crow.index_select(0, ids).long()
    count = crow.index_select(0, ids + 1).long() - first  # (tokens,)
    token = torch.repeat_interleave(count)  # (hits,): 0 0 0 1 2 2 ...
    before = torch.cumsum(count, 0) - count
    entry = torch.arange(token.numel(), device=ids.device) + (first - before).index_select(0, token)
    return token * shape[1] + col.index_select(0, entry), entry


@_sparse_product.register_fake
def _(x: Tensor, delta: Tensor, indices: Tensor, shape: Any, transposed: bool) -> Tensor:
    wide = accumulation_dtype(x.dtype, delta.dtype)
    return x.new_empty((x.shape[0], shape[1 if transposed else 0]), dtype=wide)


@_sampled_product.register_fake
def _(left: Tensor, right: Tensor, indices: Tensor, shape: Any, count: int) -> Tensor:
    return left.new_empty(count, dtype=accumulation_dtype(left.dtype, right.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, delta, indices, shape, transposed = inputs
    ctx.save_for_backward(x if delta.requires_grad else x.new_empty(0), delta, indices)
    ctx.shape, ctx.transposed = shape, transposed


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, delta, indices = ctx.saved_tensors
    dx = ddelta = None
    if ctx.needs_input_grad[0]:
        dx = sparse_product(grad, delta, indices, ctx.shape, transposed=not ctx.transposed)
    if ctx.needs_input_grad[1]:
        left, right = (x, grad) if ctx.transposed else (grad, x)
        ddelta = torch.ops.shira.sampled_product(left, right, indices, ctx.shape, delta.numel())
    return dx, ddelta, None, None, None


_sparse_product.register_autograd(_backward, setup_context=_setup)


def _setup_sampled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, indices, ctx.shape, _ = inputs
    ctx.save_for_backward(left, right, indices)


def _backward_of_sampled(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return what the gradient of a gradient is: the two operands' sparse products with it."""
    left, right, indices = ctx.saved_tensors
    need_left, need_right = ctx.needs_input_grad[:2]
    dleft = dright = None
    if need_left:
        dleft = sparse_product(right, grad, indices, ctx.shape).to(left.dtype)
    if need_right:
        dright = sparse_product(left, grad, indices, ctx.shape, transposed=True).to(right.dtype)
    return dleft, dright, None, None, None


_sampled_product.register_autograd(_backward_of_sampled, setup_context=_setup_sampled)


def rows_of(plan: Plan) -> Pattern:
    """Return the plan's pattern, kept: making it takes about as long as a product of few tokens."""
    return plan.kept or plan.memo("pattern", plan.pattern)


def columns_of(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the transposed matrix' compressed rows and each of its entries' place here, kept."""
    return plan.memo("columns", _columns, plan)


def _columns(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    _, row, col = plan.pattern()
    order = torch.argsort(col, stable=True)
    crow, _, col = pattern_of(torch.stack((col, row)).index_select(1, order), plan.shape[1])
    return crow, col, order
