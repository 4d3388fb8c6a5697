# SPDX-License-Identifier: Apache-2.0
"""Small things that several ops share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves the dtypes alone: inside an op they are as wanted."""
    return torch.autocast(like.device.type, enabled=False) if autocasts(like) else nullcontext()


def autocasts(like: Tensor) -> bool:
    """Whether autocast is on for tensors on the device of this one."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def runs_eagerly(*tensors: Tensor) -> bool:
    """Whether torch computes on these tensors op by op: nothing traces, fakes, transforms."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    return all(type(t) in _PLAIN and not t.is_meta for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def as_matrix(tensor: Tensor) -> Tensor:
    """``(..., n)`` as ``(rows, n)``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def no_view(result: Tensor) -> Tensor:
    """Return an op's result as a tensor of its own, which whoever gets it may write to.

    Of a view that was made inside an op, autograd lets nobody.
    """
    return result.new_empty(0).set_(result) if result._is_view() else result  # type: ignore[call-overload,no-any-return]


def shape_like(tensor: Tensor, needed: bool) -> Tensor:
    """For fake kernels: an empty tensor of this shape, or of none."""
    return tensor.new_empty(tensor.shape if needed else 0)
