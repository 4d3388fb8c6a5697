# SPDX-License-Identifier: Apache-2.0
"""Adapters in a weight by torch's own ops, for derivatives that the fast products have no rule for.

The fast products know one derivative: that of a backward pass. A graph of that pass (``create_graph
=True``), ``torch.func`` and forward-mode differentiation take derivatives of derivatives, along
directions, and of many inputs at once, and ask each op for a rule of its own. There the weight is
copied, the adapters are added to the copy by ops that have all the rules, and torch's own product
is made with it: the same result bit for bit, at the price of dense tensors of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from shira.base import accumulation_dtype, differentiable_replacement
from shira.errors import AdapterError
from shira.ops.gaps import is_packed, support_of
from shira.ops.memory import lock_of, settle
from shira.support import matrix_shape

_functorch = torch._C._functorch


def transforming() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation is at work in this thread."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


# What `torch.compiler.assume_constant_result` does, which imports the compiler: where a model is
# compiled this is asked once, as the compiler traces.
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


@_disable_dynamo  # where a transform is compiled, the graph breaks here
def plain_weight(weight: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Return what `shira.ops.adapted_weight` does, by ops of torch alone.

    Any of the tensors may be one that ``torch.func`` has wrapped; the ``(2, k_i)`` positions of
    several models, too.

    Raises:
        SupportError: If indices are out of range, unsorted or repeated.
        AdapterError: If a delta has another number of values than positions, or the positions of
            several models are packed.
    """
    base = _copied(weight).reshape(-1)
    wide = accumulation_dtype(*(delta.dtype for delta in deltas))
    total = torch.zeros(base.shape, dtype=wide, device=weight.device)
    touched = torch.zeros(base.shape, dtype=torch.bool, device=weight.device)
    for delta, positions in zip(deltas, indices, strict=True):
        at = _flat(positions, weight.shape)
        if delta.shape != at.shape:
            raise AdapterError(f"{at.numel()} positions need as many values, not {delta.numel()}")
        total = total.index_put((at,), delta.to(wide), accumulate=True)
        touched = touched.index_put((at,), touched.new_ones(()))
    # `where` for the sake of negative zeros, which are none once a zero is added
    adapted = differentiable_replacement(base, total)
    return torch.where(touched, adapted, base).view(weight.shape)


def gradients_with_a_graph(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of a function's inputs, those that are needed, differentiable again."""
    needs = [need and t.requires_grad for t, need in zip(inputs, needs, strict=True)]
    found: list[Tensor | None] = [None] * len(inputs)
    with torch.enable_grad():
        # each seen apart from the others, which may be the same tensor
        seen = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        places = [place for place, need in enumerate(needs) if need]
        if places:
            wanted = [seen[place] for place in places]
            made = torch.autograd.grad(function(*seen), wanted, grad, create_graph=True)
            for place, gradient in zip(places, made, strict=True):
                found[place] = gradient
    return found


def _copied(weight: Tensor) -> Tensor:
    """Return a copy of a base weight, while no other thread has an adapter in it."""
    own = _unwrapped(weight)
    if own.is_meta or type(own) not in (Tensor, torch.nn.Parameter):
        return weight.clone()
    settle(own)
    with lock_of(own):
        return weight.clone()


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _flat(positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return positions as flat, row-major indices, int64 ``(k,)``, checked."""
    with temporarily_clear_interpreter_stack():  # they are looked at as numbers
        flat = _checked(positions, shape)
    return flat if flat is not None else positions[0].long() * matrix_shape(shape)[1] + positions[1]


def _checked(positions: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Check positions and return them flat; None if they are those of several models."""
    if not _functorch.is_functorch_wrapped_tensor(positions):
        return support_of(positions, shape).indices.long()
    inner = _functorch.get_unwrapped(positions)
    if not _functorch.is_batchedtensor(positions):
        return _checked(inner, shape)
    if is_packed(positions):
        raise AdapterError(
            "the positions of several models cannot be packed; take them from the models' "
            "state_dict(), where they are rows and columns"
        )
    for each in inner.unbind(_functorch.maybe_get_bdim(positions)):
        _checked(each, shape)
    return None
