# SPDX-License-Identifier: Apache-2.0
"""``shira::linear``: a matrix product with the adapters inside the weight, and its gradient.

A ``torch.library`` custom op that mutates nothing seen from outside: compile, export,
checkpointing and FSDP2 treat it like any other. Saved for backward are the input and the values,
never the weight's adapted entries: the weight is put into the adapted state again for ``dx``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shira.ops.plan import plan_for
from shira.ops.resident import resident
from shira.ops.util import no_autocast, shape_like
from shira.ops.weight_gradient import weight_gradient


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
    with no_autocast(x), resident(weight, plan, deltas, x.dtype) as adapted:
        return F.linear(x, adapted.t() if transposed else adapted, _cast(bias, x.dtype))


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
    """``[dx, dweight, dvalues...]``; an empty tensor for what ``needs`` says no to."""
    need_x, need_weight, need_values = needs
    plan = plan_for(indices, weight.shape, weight.stride())
    dx, dweight = grad.new_empty(0), grad.new_empty(0)
    dvalues = [delta.new_empty(0) for delta in deltas]
    with no_autocast(grad):
        # dx last: it is not yet there while the others need room to work in
        if need_weight or need_values:  # else x was not kept
            left, right = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            if transposed:
                left, right = right, left
            if need_weight:
                dweight = (left.t() @ right).to(weight.dtype)
            if need_values:
                parts = plan.split(weight_gradient(left, right, plan))
                dvalues = [d.to(delta.dtype) for d, delta in zip(parts, deltas, strict=True)]
        if need_x:
            with resident(weight, plan, deltas, grad.dtype) as adapted:
                dx = grad @ (adapted.t() if transposed else adapted)
    return [dx, dweight, *dvalues]


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
        indices: int32 ``(2, k_i)`` for each: rows and columns of ``weight``, sorted.
        transposed: The weight is stored ``(in, out)``, as transformers' Conv1D does.

    Returns:
        ``(..., out)`` in the dtype of ``x``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
    """
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, deltas, indices, transposed = inputs
    # x is what the gradient of values and weight needs; without them it is not kept alive
    keeps_x = weight.requires_grad or any(delta.requires_grad for delta in deltas)
    ctx.save_for_backward(x if keeps_x else x.new_empty(0), weight, *deltas, *indices)
    ctx.transposed = transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    need_x, need_weight, need_bias, need_deltas = ctx.needs_input_grad[:4]
    needs = [need_x, need_weight, any(need_deltas)]
    dbias = None
    if need_bias:
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    nothing: list[Tensor | None] = [None] * len(deltas)
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


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
