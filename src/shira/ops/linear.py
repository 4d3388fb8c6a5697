# SPDX-License-Identifier: Apache-2.0
"""``shira::linear``: a matrix product with the adapters inside the weight, and its gradient.

A ``torch.library`` custom op that mutates nothing seen from outside: compile, export,
checkpointing and FSDP2 treat it like any other. Saved for backward are the input and the values,
never the weight's adapted entries: the weight is put into the adapted state again for ``dx``.

Where torch runs ops one by one, the same two functions are called through an `autograd.Function`
instead: the machinery around a custom op, its code and data fetched anew after each large product,
was measured at a tenth of a 1024 x 1024 layer's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from shira.ops.gradient import weight_gradient
from shira.ops.plan import Plan, plan_for
from shira.ops.resident import resident
from shira.ops.util import as_matrix, autocasts, no_view, runs_eagerly, shape_like


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    plan: Plan,
    transposed: bool,
) -> Tensor:
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, weight, bias, deltas, plan, transposed)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    # A result of more than two dimensions is a view in torch, and autograd lets nobody write to a
    # view that was made inside an op: the product is one of matrices, the same bits.
    rows = x.flatten(0, -2) if x.dim() > 2 and x.is_contiguous() else x
    result = resident(
        weight,
        plan,
        deltas,
        x.dtype,
        lambda adapted: F.linear(rows, adapted.t() if transposed else adapted, bias),
    )
    if rows is not x:
        return result.resize_(*x.shape[:-1], result.shape[-1])
    return result if x.dim() == 2 else no_view(result)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    plan: Plan,
    transposed: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """``dx, dweight, dvalues``; None for what ``needs`` says no to."""
    if autocasts(grad):
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(grad, x, weight, deltas, plan, transposed, needs)
    need_x, need_weight, need_values = needs
    dx = dweight = None
    dvalues: Sequence[Tensor | None] = [None] * len(deltas)
    # dx last: it is not yet there while the others need room to work in
    if need_weight or need_values:  # else x was not kept
        left, right = as_matrix(grad), as_matrix(x)
        if transposed:
            left, right = right, left
        if need_weight:
            dweight = (left.t() @ right).to(weight.dtype)
        if need_values:
            dvalues = plan.split(weight_gradient(left, right, plan), deltas)
    if need_x:
        dx = resident(
            weight,
            plan,
            deltas,
            grad.dtype,
            lambda adapted: grad @ (adapted.t() if transposed else adapted),
        )
    return dx, dweight, dvalues


@torch.library.custom_op(
    "shira::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor[] deltas, Tensor[] indices, "
    "bool transposed) -> Tensor",
)
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    transposed: bool,
) -> Tensor:
    plan = plan_for(indices, weight.shape, weight.stride())
    return _forward(x, weight, bias, deltas, plan, transposed)


@torch.library.custom_op(
    "shira::linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor[] deltas, Tensor[] indices, "
    "bool transposed, bool[] needs) -> Tensor[]",
)
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    transposed: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``[dx, dweight, dvalues...]``; an op cannot say None: an empty tensor instead."""
    plan = plan_for(indices, weight.shape, weight.stride())
    dx, dweight, dvalues = _gradients(grad, x, weight, deltas, plan, transposed, needs)
    return [grad.new_empty(0) if d is None else d for d in (dx, dweight, *dvalues)]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    transposed: bool = False,
) -> Tensor:
    """``x W'^T + bias``, W' the weight with every delta at its positions.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, or ``(in, out)`` if ``transposed``. Between calls it is untouched.
            Of another dtype than ``x`` it is cast, as autocast does.
        bias: ``(out,)`` or None.
        deltas: ``(k_i,)`` for each active adapter, scale included; any floating dtype.
        indices: int32 ``(2, k_i)`` for each: rows and columns of ``weight``, sorted;
            or `packed`.
        transposed: The weight is stored ``(in, out)``, as transformers' Conv1D does.

    Returns:
        ``(..., out)`` in the dtype of ``x``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
    """
    if runs_eagerly(x, weight, *deltas):
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            plan = plan_for(indices, weight.shape, weight.stride())
            return _forward(x, weight, bias, deltas, plan, transposed)
        return _apply_eagerly(x, weight, bias, transposed, *deltas, *indices)  # type: ignore[no-any-return]
    result: Tensor = torch.ops.shira.linear(
        x, weight, bias, list(deltas), list(indices), transposed
    )
    return result


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, deltas: Any, indices: Any, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


@_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Any,
    transposed: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    fan_in = weight.shape[0 if transposed else 1]
    dx = grad.new_empty((*grad.shape[:-1], fan_in) if needs[0] else 0)
    return [dx, shape_like(weight, needs[1]), *(shape_like(d, needs[2]) for d in deltas)]


def _bias_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, deltas, indices, ctx.transposed = inputs
    keeps_x = weight.requires_grad or any(delta.requires_grad for delta in deltas)
    ctx.save_for_backward(x if keeps_x else x.new_empty(0), weight, *deltas, *indices)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    need_x, need_weight, need_bias, need_deltas = ctx.needs_input_grad[:4]
    needs = [need_x, need_weight, any(need_deltas)]
    nothing: list[Tensor | None] = [None] * len(deltas)
    dbias = _bias_gradient(ctx, grad) if need_bias else None
    if not any(needs):
        return None, None, dbias, nothing, nothing, None
    dx, dweight, *dvalues = torch.ops.shira.linear_backward(
        grad, x, weight, deltas, indices, ctx.transposed, needs
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias,
        dvalues if needs[2] else nothing,
        nothing,
        None,
    )


_linear.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the op's machinery; deltas and indices stand one by one at the end."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, *rest: Tensor
    ) -> Tensor:
        count = len(rest) // 2
        deltas, indices = rest[:count], rest[count:]
        _, need_weight, _, _, *need_rest = ctx.needs_input_grad
        # x is what the gradient of values and weight needs; without them it is not kept alive
        keeps_x = need_weight or True in need_rest
        ctx.save_for_backward(x if keeps_x else None, weight, *rest)
        plan = plan_for(indices, weight.shape, weight.stride())
        ctx.plan, ctx.transposed = plan, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, weight, bias, deltas, plan, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # a graph of this pass is wanted, which cannot be had
            return _without_a_graph(ctx, grad)
        x, weight, *rest = ctx.saved_tensors
        count, plan = len(rest) // 2, ctx.plan
        need_x, need_weight, need_bias, _, *need_rest = ctx.needs_input_grad
        needs = (need_x, need_weight, True in need_rest)
        if weight.stride() != plan.stride:  # hooks on saved tensors may lay it out anew
            plan = plan_for(rest[count:], weight.shape, weight.stride())
        dx, dweight, dvalues = _gradients(
            grad, x, weight, rest[:count], plan, ctx.transposed, needs
        )
        dbias = _bias_gradient(ctx, grad) if need_bias else None
        return dx, dweight, dbias, None, *dvalues, *[None] * count


_without_a_graph = once_differentiable(_Eager.backward)
# The class method of `Function`, without what it does for functorch and for a setup_context.
_apply_eagerly: Any = super(torch.autograd.Function, _Eager).apply
