# SPDX-License-Identifier: Apache-2.0
"""`linear`, `convolution`, `embedding` with adapters inside the weight; `adapted_weight`, a copy.

The first three as `shira.ops.product` makes them: the weight holds the adapter only inside the
product, and its gradient reaches the entries of the support alone. Whoever computes with a weight
in a way of its own takes the copy, at the cost that the others avoid: autograd keeps it for as long
as it needs it, and in the backward pass there is the weight's dense gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shira.base import accumulation_dtype
from shira.errors import ConfigError
from shira.ops.gradient import weight_gradient
from shira.ops.plain import plain_weight, transforming
from shira.ops.plan import Plan, plan_for
from shira.ops.product import Gradients, Options, Product, Within
from shira.ops.resident import resident


class _Linear(Product):
    """Options: ``transposed``."""

    def forward(self, x: Tensor, bias: Tensor | None, options: Options, weight: Tensor) -> Tensor:
        (transposed,) = options
        return F.linear(x, weight.t() if transposed else weight, bias)

    def gradients(
        self, grad: Tensor, x: Tensor, options: Options, weight: Tensor, within: Within,
        plan: Plan, needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        (transposed,), (need_x, need_weight, need_values) = options, needs
        dx = dweight = dvalues = None
        # dx last: it is not yet there while the others need room to work in
        if need_weight or need_values:
            left, right = _as_matrix(grad), _as_matrix(x)
            if transposed:
                left, right = right, left
            if need_weight:
                dweight = left.t() @ right
            if need_values:
                dvalues = weight_gradient(left, right, plan)
        if need_x:
            dx = within(lambda adapted: grad @ (adapted.t() if transposed else adapted))
        return dx, dweight, dvalues

    def fake_dx(self, grad: Tensor, x: Tensor, options: Options, weight: Tensor) -> Tensor:
        (transposed,) = options
        return grad.new_empty((*grad.shape[:-1], weight.shape[0 if transposed else 1]))


class _Convolution(Product):
    """Options: ``stride, padding, dilation, transposed, output_padding, groups``.

    The dense gradient of the convolution weight is made by torch's own kernel, gathered at the
    support, and let go within the op.
    """

    keeps_x = True

    def forward(self, x: Tensor, bias: Tensor | None, options: Options, weight: Tensor) -> Tensor:
        return torch.convolution(x, weight, bias, *options)

    def gradients(
        self, grad: Tensor, x: Tensor, options: Options, weight: Tensor, within: Within,
        plan: Plan, needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        need_x, need_weight, need_values = needs
        wanted = [need_x, need_weight or need_values, False]
        backward = torch.ops.aten.convolution_backward
        dx, dense, _ = within(lambda adapted: backward(grad, x, adapted, None, *options, wanted))
        return dx, dense if need_weight else None, _gathered(dense, plan) if need_values else None

    def fake_dx(self, grad: Tensor, x: Tensor, options: Options, weight: Tensor) -> Tensor:
        return torch.empty_like(x)

    def dbias(self, grad: Tensor) -> Tensor:
        return grad.sum((0, *range(2, grad.dim())))


class _Embedding(Product):
    """Options: ``padding_idx``, -1 for none.

    The gradient of the values needs only the rows that were looked up: they are summed in a buffer
    of (ids) x dim, never in one of the table's size.
    """

    def forward(self, x: Tensor, bias: Tensor | None, options: Options, weight: Tensor) -> Tensor:
        (padding_idx,) = options
        return F.embedding(x, weight, padding_idx if padding_idx >= 0 else None)

    def gradients(
        self, grad: Tensor, x: Tensor, options: Options, weight: Tensor, within: Within,
        plan: Plan, needs: Sequence[bool],
    ) -> Gradients:  # fmt: skip
        (padding_idx,), (_, need_weight, need_values) = options, needs
        dweight = None
        if need_weight:
            backward = torch.ops.aten.embedding_dense_backward
            dweight = backward(grad, x, weight.shape[0], padding_idx, False)
        return None, dweight, _row_sums(grad, x, plan, padding_idx) if need_values else None


_linear = _Linear("linear", "bool transposed")
_convolution = _Convolution(
    "convolution",
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, "
    "int groups",
)
_embedding = _Embedding("embedding", "int padding_idx")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    transposed: bool = False,
) -> Tensor:
    """Compute ``x W'^T + bias``, W' the weight with every delta at its positions.

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
        AdapterError: If a delta has another number of values than positions.

    Example:
        >>> weight, delta = torch.zeros(2, 3), torch.tensor([5.0])
        >>> shira.ops.linear(torch.ones(1, 3), weight, None, [delta], [torch.tensor([[1], [2]])])
        tensor([[0., 5.]])
    """
    return _linear(x, weight, bias, deltas, indices, transposed)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """Compute a convolution with every delta at its positions in the weight.

    As ``torch.nn.functional.conv1d`` to ``conv3d`` and ``conv_transpose1d`` to
    ``conv_transpose3d`` do, by the number of the weight's dimensions; the options are theirs.

    Args:
        x: ``(batch, in, *size)``, or ``(in, *size)``; one to three sizes.
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` if
            ``transposed``; untouched between calls.
        bias: ``(out,)`` or None.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        indices: int32 ``(2, k_i)`` for each: place in the first dimension of the weight, and in all
            others together; or `packed`.
        stride: Of the window, as all that follow one number, or one for each size.
        padding: Zeros around the input; or ``"same"`` or ``"valid"``, if not ``transposed``.
        dilation: Of the window.
        transposed: Compute a transposed convolution.
        output_padding: Added to one end of the output of a transposed convolution.
        groups: Of channels.

    Returns:
        ``(batch, out, *size')`` in the dtype of ``x``, or without the batch as ``x`` is.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
        AdapterError: If a delta has another number of values than positions.
        ConfigError: If ``padding`` is another word, or ``"same"`` with a stride.

    Example:
        >>> weight, delta = torch.zeros(1, 2, 1, 1), torch.tensor([3.0])
        >>> indices = torch.tensor([[0], [1]])
        >>> shira.ops.convolution(torch.ones(1, 2, 1, 1), weight, None, [delta], [indices]).item()
        3.0
    """
    batch = x.unsqueeze(0) if x.dim() == weight.dim() - 1 else x
    dims = weight.dim() - 2
    stride, dilation = _for_each(stride, dims), _for_each(dilation, dims)
    if isinstance(padding, str):
        batch, padding = _padded(batch, weight, padding, stride, dilation)
    options = transposed, _for_each(output_padding, dims), groups
    result = _convolution(
        batch, weight, bias, deltas, indices, stride, _for_each(padding, dims), dilation, *options
    )
    return result if batch.dim() == x.dim() else result.squeeze(0)


conv2d = convolution
"""The name that it had while it took images only."""


def embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """Compute ``torch.nn.functional.embedding`` with every delta at its positions in the table.

    Args:
        ids: Integers of any shape.
        weight: ``(rows, dim)``; untouched between calls.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        indices: int32 ``(2, k_i)`` for each: rows and columns, sorted;
            or `packed`.
        padding_idx: A row that gets no gradient; below zero it counts from the end.

    Returns:
        ``(*ids.shape, dim)`` in the dtype of ``weight``.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
        AdapterError: If a delta has another number of values than positions.
        ConfigError: If ``padding_idx`` is no row.

    Example:
        >>> table, delta = torch.zeros(4, 2), torch.tensor([7.0])
        >>> shira.ops.embedding(torch.tensor([3, 0]), table, [delta], [torch.tensor([[3], [1]])])
        tensor([[0., 7.],
                [0., 0.]])
    """
    skipped, rows = -1, weight.shape[0]
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise ConfigError(f"padding_idx is one of the {rows} rows, not {padding_idx}")
        skipped = padding_idx % rows
    return _embedding(ids, weight, None, deltas, indices, skipped)


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
        AdapterError: If a delta has another number of values than positions.
    """
    if transforming():
        return plain_weight(weight, deltas, indices)
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
    return plan.split(_gathered(grad, plan), deltas)


@torch.library.custom_op(
    "shira::adapted_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor[] deltas, Tensor[] indices) -> Tensor",
)
def _adapted_weight(weight: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    plan = plan_for(indices, weight.shape, weight.stride())
    return resident(weight, plan, deltas, weight.dtype, Tensor.clone)


_adapted_weight_backward = torch.library.custom_op(
    "shira::adapted_weight_backward",
    value_gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor[] deltas, Tensor[] indices) -> Tensor[]",
)
_adapted_weight.register_fake(lambda weight, deltas, indices: torch.empty_like(weight))
_adapted_weight_backward.register_fake(lambda grad, deltas, _: [*map(torch.empty_like, deltas)])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, deltas, indices = inputs
    ctx.save_for_backward(*deltas, *indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved, need_weight = ctx.saved_tensors, ctx.needs_input_grad[0]
    deltas, indices = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    nothing: list[Tensor | None] = [None] * len(deltas)
    dvalues = nothing
    if any(ctx.needs_input_grad[1]):
        # which is made of ops that can be differentiated again, if it is not called as one op
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        make: Any = value_gradients if again else torch.ops.shira.adapted_weight_backward
        dvalues = make(grad, list(deltas), list(indices))
    return grad if need_weight else None, dvalues, nothing


_adapted_weight.register_autograd(_backward, setup_context=_setup)


def _for_each(option: int | Sequence[int], dims: int) -> list[int]:
    numbers = [option] if isinstance(option, int) else [*option]
    return numbers * dims if len(numbers) == 1 else numbers


def _padded(
    x: Tensor, weight: Tensor, padding: str, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Return the input and the zeros at both its ends, for a padding that is given as a word.

    Done as torch does it, for its bits: of an odd number the last zero is written into a copy.
    """
    kernel = weight.shape[2:]
    if padding == "valid":
        return x, [0] * len(kernel)
    if padding != "same" or any(step != 1 for step in stride):
        raise ConfigError(
            f"padding is a number, 'valid', or with a stride of 1 'same', not {padding!r} with a "
            f"stride of {tuple(stride)}"
        )
    total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if any(zeros % 2 for zeros in total):
        x = F.pad(x, [end for zeros in reversed(total) for end in (0, zeros % 2)])
    return x, [zeros // 2 for zeros in total]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _gathered(dense: Tensor, plan: Plan) -> Tensor:
    """Return the entries of a dense gradient at a plan's support, ``(k,)``, in float32 or wider."""
    values = dense.reshape(-1).index_select(0, plan.flat())
    return values.to(accumulation_dtype(dense.dtype))


def _row_sums(grad: Tensor, ids: Tensor, plan: Plan, padding_idx: int) -> Tensor:
    """Return the sum of the gradients of the look-ups of each entry's row: ``(k,)``."""
    cols = plan.shape[1]
    wide = accumulation_dtype(grad.dtype)
    ids = ids.reshape(-1)
    if not ids.numel() or not plan.nnz:
        return torch.zeros(plan.nnz, dtype=wide, device=grad.device)
    # as torch.unique, which would wait for the device: rows of repeats stay zero
    looked_up = ids.sort().values
    place = torch.searchsorted(looked_up, ids)  # the first of equals
    summed = torch.zeros(looked_up.numel(), cols, dtype=wide, device=grad.device)
    summed.index_add_(0, place, grad.reshape(-1, cols).to(wide))
    if padding_idx >= 0:
        summed.masked_fill_((looked_up == padding_idx).unsqueeze(1), 0)
    row, col = (half.long() for half in plan.pattern()[1:])
    at = torch.searchsorted(looked_up, row).clamp_(max=looked_up.numel() - 1)
    return torch.where(looked_up[at] == row, summed[at, col], 0)
