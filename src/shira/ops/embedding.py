# SPDX-License-Identifier: Apache-2.0
"""``shira::embedding``: a table look-up with the adapters inside the table, and its gradient.

The gradient of the values needs only the rows that were looked up: they are summed in a buffer of
(distinct ids) x dim, never in one of the table's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shira.base import accumulation_dtype
from shira.ops.plan import Plan, plan_for
from shira.ops.resident import resident
from shira.ops.util import shape_like


@torch.library.custom_op(
    "shira::embedding",
    mutates_args=(),
    schema="(Tensor ids, Tensor weight, Tensor[] deltas, Tensor[] indices, int padding_idx) "
    "-> Tensor",
)
def _embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    padding_idx: int,
) -> Tensor:
    plan = plan_for(indices, weight.shape, weight.stride())

    def rows(adapted: Tensor) -> Tensor:
        # as F.embedding, which returns a view: see `shira.ops.linear`
        found = adapted.index_select(0, ids.reshape(-1))
        return found.resize_(*ids.shape, adapted.shape[1])

    return resident(weight, plan, deltas, weight.dtype, rows)


@torch.library.custom_op(
    "shira::embedding_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor ids, Tensor weight, Tensor[] deltas, Tensor[] indices, "
    "int padding_idx, bool[] needs) -> Tensor[]",
)
def _embedding_backward(
    grad: Tensor,
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    padding_idx: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``[dweight, dvalues...]``; an empty tensor for what ``needs`` says no to."""
    need_weight, need_values = needs
    dweight = grad.new_empty(0)
    if need_weight:
        dweight = torch.ops.aten.embedding_dense_backward(
            grad, ids, weight.shape[0], padding_idx, False
        ).to(weight.dtype)
    dvalues = [delta.new_empty(0) for delta in deltas]
    if need_values:
        plan = plan_for(indices, weight.shape, weight.stride())
        dvalues = plan.split(_value_gradient(grad, ids, plan, padding_idx), deltas)
    return [dweight, *dvalues]


def _value_gradient(grad: Tensor, ids: Tensor, plan: Plan, padding_idx: int) -> Tensor:
    """Sum of the gradients of the look-ups of each entry's row: ``(k,)``."""
    cols = plan.shape[1]
    wide = accumulation_dtype(grad.dtype)
    ids = ids.reshape(-1)
    if not ids.numel() or not plan.nnz:
        return torch.zeros(plan.nnz, dtype=wide, device=grad.device)
    looked_up, place = torch.unique(ids, return_inverse=True)
    summed = torch.zeros(looked_up.numel(), cols, dtype=wide, device=grad.device)
    summed.index_add_(0, place, grad.reshape(-1, cols).to(wide))
    if padding_idx >= 0:
        summed[looked_up == padding_idx] = 0
    row, col = (half.long() for half in plan.pattern()[1:])
    at = torch.searchsorted(looked_up, row).clamp_(max=looked_up.numel() - 1)
    return torch.where(looked_up[at] == row, summed[at, col], 0)


def embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding`` with every delta at its positions in the table.

    Args:
        ids: Integers of any shape.
        weight: ``(rows, dim)``; untouched between calls.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        indices: int32 ``(2, k_i)`` for each: rows and columns, sorted;
            or `packed`.
        padding_idx: A row that gets no gradient.

    Returns:
        ``(*ids.shape, dim)`` in the dtype of ``weight``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
    """
    skipped = -1 if padding_idx is None else padding_idx
    result: Tensor = torch.ops.shira.embedding(ids, weight, list(deltas), list(indices), skipped)
    return result


@_embedding.register_fake
def _(ids: Tensor, weight: Tensor, deltas: Any, indices: Any, padding_idx: int) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@_embedding_backward.register_fake
def _(
    grad: Tensor,
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Any,
    padding_idx: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [shape_like(weight, needs[0]), *(shape_like(d, needs[1]) for d in deltas)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, deltas, indices, padding_idx = inputs
    ctx.save_for_backward(ids, weight, *deltas, *indices)
    ctx.padding_idx = padding_idx


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, weight, *rest = ctx.saved_tensors
    deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    needs = [ctx.needs_input_grad[1], any(ctx.needs_input_grad[2])]
    nothing: list[Tensor | None] = [None] * len(deltas)
    if not any(needs):
        return None, None, nothing, nothing, None
    dweight, *dvalues = torch.ops.shira.embedding_backward(
        grad, ids, weight, deltas, indices, ctx.padding_idx, needs
    )
    return (
        None,
        dweight if needs[0] else None,
        dvalues if needs[1] else nothing,
        nothing,
        None,
    )


_embedding.register_autograd(_backward, setup_context=_setup)
