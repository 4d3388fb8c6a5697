# SPDX-License-Identifier: Apache-2.0
"""Products with a stack of matrices, ``[experts, out, in]``, that holds adapters in each of them.

A mixture's experts multiply in one of two ways. One expert after the other, with a matrix of the
stack: then `pieces_of` says which entries of an adapter are in it, and the product is
`shira.ops.linear`. Or all at once, with the rows of the input in groups, one group for each expert
(`grouped`): torch's own function is called while the stack holds the adapters. The gradient of the
values is made group by group, at the entries of the experts that have rows; what the others have is
zero, and never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.ops.gaps import pack
from shira.ops.gradient import weight_gradient
from shira.ops.plain import gradients_with_a_graph, plain_weight
from shira.ops.plan import Plan, plan_for
from shira.ops.product import no_autocast
from shira.ops.resident import resident
from shira.support import Support


class Pieces(NamedTuple):
    """The entries of a support, matrix by matrix."""

    sizes: list[int]
    """The number of entries in each."""
    indices: list[Tensor]
    """Their positions in it, as ops take them."""


def pieces_of(plan: Plan, rows: tuple[int, ...] | None = None) -> Pieces:
    """Return the entries of a plan for a stack of matrices; made once a plan. O(k).

    Or for a weight that is cut into pieces of so many ``rows`` each.
    """
    return plan.memo(("pieces", rows), _pieces, plan, rows)


def _pieces(plan: Plan, rows: tuple[int, ...] | None) -> Pieces:
    matrices, *one = plan.weight_shape
    size = math.prod(one)
    flat = plan.flat()
    starts = [0, *accumulate(rows or (1,) * matrices)]
    bounds = torch.tensor(starts, device=flat.device) * size
    sizes = [high - low for low, high in pairwise(torch.searchsorted(flat, bounds).tolist())]
    indices = []
    for at, piece in enumerate(torch.split(flat, sizes)):
        shape = one if rows is None else [rows[at], *one]
        support = Support._trusted(shape, piece - starts[at] * size)
        indices.append(pack(support.coordinates(), shape))
    return Pieces(sizes, indices)


Rows = Sequence[tuple[int, int]]
"""``(first, last)`` of the rows of each matrix of the stack, in the input as a matrix."""


def grouped(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    rows: Callable[[], Rows],
    *,
    transposed: bool,
) -> Tensor:
    """Compute a product of groups of rows, each with its matrix of the stack.

    Args:
        product: ``product(x, stack)``, with the stack as ``[experts, in, out]``: torch's own. It is
            also called with the gradient and the stack as ``[experts, out, in]``.
        x: ``(tokens, in)``, or ``(experts, tokens, in)``.
        weight: ``(experts, in, out)``, or ``(experts, out, in)`` if ``transposed``; untouched
            between calls.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        indices: Positions of each: see `shira.ops.linear`.
        rows: Those of each matrix; called once, if values need a gradient.
        transposed: The weight is stored ``[experts, out, in]``.

    Returns:
        What ``product`` returns.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
        AdapterError: If a delta has another number of values than positions.
    """
    result: Tensor = _Grouped.apply(  # type: ignore[no-untyped-call]
        product, rows, transposed, x, weight, *deltas, *indices
    )
    return result


class _Grouped(torch.autograd.Function):
    """See `grouped`; deltas and indices stand one by one at the end."""

    @staticmethod
    def forward(
        ctx: Any, product: Any, rows: Any, transposed: bool, x: Tensor, weight: Tensor,
        *rest: Tensor,
    ) -> Tensor:  # fmt: skip
        deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        trains = True in ctx.needs_input_grad[5:]
        ctx.save_for_backward(x if trains else None, weight, *rest)
        ctx.product, ctx.transposed = product, transposed
        ctx.rows = rows() if trains else ()
        plan = plan_for(indices, weight.shape, weight.stride())

        def compute(stack: Tensor) -> Tensor:
            return product(x, stack.mT if transposed else stack)  # type: ignore[no-any-return]

        with no_autocast(x):
            return resident(weight, plan, deltas, x.dtype, compute)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        if torch.is_grad_enabled():  # a graph of this pass is wanted
            dx, *dvalues = _gradients_with_a_graph(ctx, grad, x, weight, deltas, indices)
            return None, None, None, dx, None, *dvalues, *[None] * len(indices)
        plan = plan_for(indices, weight.shape, weight.stride())
        grad, product, transposed = grad.contiguous(), ctx.product, ctx.transposed
        dx, dvalues = None, [None] * len(deltas)

        def compute(stack: Tensor) -> Tensor:
            return product(grad, stack if transposed else stack.mT)  # type: ignore[no-any-return]

        with no_autocast(grad):
            if x is not None:
                values = _value_gradients(ctx, grad, x, weight, plan)
                dvalues = plan.split(values, deltas)  # type: ignore[assignment]
            if ctx.needs_input_grad[3]:
                dx = resident(weight, plan, deltas, grad.dtype, compute)
        return None, None, None, dx, None, *dvalues, *[None] * len(indices)


def _gradients_with_a_graph(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    if x is None:  # not kept, for only its own gradient is needed, which is the same at any x
        width = weight.shape[2 if ctx.transposed else 1]
        x = grad.new_zeros(*grad.shape[:-1], width).requires_grad_()

    def product(x: Tensor, *deltas: Tensor) -> Tensor:
        with no_autocast(x):
            stack = plain_weight(weight, deltas, indices).to(x.dtype)
            return ctx.product(x, stack.mT if ctx.transposed else stack)  # type: ignore[no-any-return]

    needs = ctx.needs_input_grad[3], *ctx.needs_input_grad[5 : 5 + len(deltas)]
    return gradients_with_a_graph(product, (x, *deltas), needs, grad)


def _value_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """Return ``(k,)``, the gradient at a plan's entries, group by group."""
    pieces, wide = pieces_of(plan), accumulation_dtype(grad.dtype)
    left, right = (grad, x) if ctx.transposed else (x, grad)
    left, right = (half.reshape(-1, half.shape[-1]) for half in (left, right))
    values = torch.zeros(plan.nnz, dtype=wide, device=grad.device)
    parts = zip(torch.split(values, pieces.sizes), pieces.indices, ctx.rows, strict=True)
    one = weight[0]
    for part, positions, (first, last) in parts:
        if last > first and part.numel():
            own = plan_for([positions], one.shape, one.stride())
            part.copy_(weight_gradient(left[first:last], right[first:last], own))
    return values
