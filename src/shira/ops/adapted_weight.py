# SPDX-License-Identifier: Apache-2.0
"""``shira::adapted_weight``: a copy of a weight with the adapters inside, and its gradient.

For whoever computes with a weight in a way of its own. It costs what the other ops avoid: a copy of
the weight, which autograd keeps for as long as it needs it, and in the backward pass the weight's
dense gradient, of which the entries at the support are taken before it is let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.ops.plan import Plan, plan_for
from shira.ops.resident import resident


@torch.library.custom_op(
    "shira::adapted_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor[] deltas, Tensor[] indices) -> Tensor",
)
def _adapted_weight(weight: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    plan = plan_for(indices, weight.shape, weight.stride())
    return resident(weight, plan, deltas, weight.dtype, Tensor.clone)


@torch.library.custom_op(
    "shira::adapted_weight_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] deltas, Tensor[] indices) -> Tensor[]",
)
def _adapted_weight_backward(
    grad: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]
) -> list[Tensor]:
    return value_gradients(grad, deltas, indices)


def adapted_weight(weight: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Return a copy of ``weight`` with every delta at its positions, differentiable.

    Args:
        weight: Of any shape; untouched between calls.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        indices: int32 ``(2, k_i)`` for each: rows and columns of the weight's matrix, sorted; or
            `packed`.

    Returns:
        A tensor of the shape and dtype of ``weight``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
    """
    result: Tensor = torch.ops.shira.adapted_weight(weight, list(deltas), list(indices))
    return result


def value_gradients(
    grad: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of deltas, given that of the weight they are in.

    Args:
        grad: Of the weight's shape, dense or (of an embedding) sparse.
        deltas: ``(k_i,)`` for each active adapter.
        indices: As in `adapted_weight`.

    Returns:
        ``(k_i,)`` for each, in its delta's dtype.
    """
    grad = (grad.to_dense() if grad.is_sparse else grad).contiguous()
    plan = plan_for(indices, grad.shape, grad.stride())
    return plan.split(gathered(grad, plan), deltas)


def gathered(dense: Tensor, plan: Plan) -> Tensor:
    """Return the entries of a dense gradient at a plan's support, ``(k,)``, in float32 or wider."""
    values = dense.reshape(-1).index_select(0, plan.flat())
    return values.to(accumulation_dtype(dense.dtype))


@_adapted_weight.register_fake
def _(weight: Tensor, deltas: Any, indices: Any) -> Tensor:
    return torch.empty_like(weight)


@_adapted_weight_backward.register_fake
def _(grad: Tensor, deltas: Sequence[Tensor], indices: Any) -> list[Tensor]:
    return [torch.empty_like(delta) for delta in deltas]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, deltas, indices = inputs
    ctx.save_for_backward(*deltas, *indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved, need_weight = ctx.saved_tensors, ctx.needs_input_grad[0]
    deltas, indices = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    nothing: list[Tensor | None] = [None] * len(deltas)
    dvalues = nothing
    if any(ctx.needs_input_grad[1]):
        dvalues = torch.ops.shira.adapted_weight_backward(grad, list(deltas), list(indices))
    return grad if need_weight else None, dvalues, nothing


_adapted_weight.register_autograd(_backward, setup_context=_setup)
