# SPDX-License-Identifier: Apache-2.0
"""``shira::conv2d``: a 2-D convolution with the adapters inside the weight, and its gradient.

As ``shira::linear``. The dense gradient of the small convolution weight is made by torch's own
kernel, gathered at the support, and let go within the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shira.ops.adapted_weight import gathered
from shira.ops.plan import plan_for
from shira.ops.resident import resident
from shira.ops.util import no_autocast, shape_like


@torch.library.custom_op(
    "shira::conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor[] deltas, Tensor[] indices, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
)
def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    plan = plan_for(indices, weight.shape, weight.stride())
    bias = None if bias is None else bias.to(x.dtype)

    def product(adapted: Tensor) -> Tensor:
        return F.conv2d(x, adapted, bias, stride, padding, dilation, groups)  # type: ignore[call-overload,no-any-return]

    with no_autocast(x):
        return resident(weight, plan, deltas, x.dtype, product)


@torch.library.custom_op(
    "shira::conv2d_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor[] deltas, Tensor[] indices, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool[] needs) -> Tensor[]",
)
def _conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``[dx, dweight, dvalues...]``; an empty tensor for what ``needs`` says no to."""
    need_x, need_weight, need_values = needs
    plan = plan_for(indices, weight.shape, weight.stride())

    def product(adapted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            grad,
            x,
            adapted,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [need_x, need_weight or need_values, False],
        )

    with no_autocast(grad):
        dx, dense, _ = resident(weight, plan, deltas, grad.dtype, product)
    dvalues = [delta.new_empty(0) for delta in deltas]
    if need_values:
        dvalues = plan.split(gathered(dense, plan), deltas)
    return [
        dx if need_x else grad.new_empty(0),
        dense.to(weight.dtype) if need_weight else grad.new_empty(0),
        *dvalues,
    ]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with every delta at its positions in the weight.

    Args:
        x: ``(batch, in, height, width)``, or ``(in, height, width)``.
        weight: ``(out, in / groups, kh, kw)``; untouched between calls.
        bias: ``(out,)`` or None.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        indices: int32 ``(2, k_i)`` for each: output channel, and place in the rest of the weight;
            or `packed`.
        stride: Of the window, two numbers.
        padding: Zeros around the input, two numbers.
        dilation: Of the window, two numbers.
        groups: Of channels.

    Returns:
        ``(batch, out, height', width')`` in the dtype of ``x``, or without the batch as ``x`` is.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
    """
    geometry = (list(stride), list(padding), list(dilation), groups)
    batch = x.unsqueeze(0) if x.dim() == 3 else x
    result: Tensor = torch.ops.shira.conv2d(
        batch, weight, bias, list(deltas), list(indices), *geometry
    )
    return result.squeeze(0) if x.dim() == 3 else result


@_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    deltas: Any,
    indices: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)


@_conv2d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    dx = torch.empty_like(x) if needs[0] else grad.new_empty(0)
    return [dx, shape_like(weight, needs[1]), *(shape_like(d, needs[2]) for d in deltas)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, deltas, indices, *geometry = inputs
    ctx.save_for_backward(x, weight, *deltas, *indices)
    ctx.geometry = geometry
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    deltas, indices = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    need_x, need_weight, need_bias, need_deltas = ctx.needs_input_grad[:4]
    needs = [need_x, need_weight, any(need_deltas)]
    dbias = grad.sum((0, 2, 3)).to(ctx.bias_dtype) if need_bias else None
    nothing: list[Tensor | None] = [None] * len(deltas)
    if not any(needs):
        return (None, None, dbias, nothing, nothing, *(None,) * 4)
    dx, dweight, *dvalues = torch.ops.shira.conv2d_backward(
        grad, x, weight, deltas, indices, *ctx.geometry, needs
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias,
        dvalues if needs[2] else nothing,
        nothing,
        *(None,) * 4,
    )


_conv2d.register_autograd(_backward, setup_context=_setup)
