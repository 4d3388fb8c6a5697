# SPDX-License-Identifier: Apache-2.0
"""The weight holds the adapter only while it is multiplied: `resident`.

Before the product the k originals are read and the replacement values written in their place;
after it, also after an exception or an interrupt, the originals are written back (`write_to`). So
the base weight is pristine between calls, no copy of it is made, and putting back is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from shira.base import replacement
from shira.ops import native
from shira.ops.memory import (
    SharedMemoryError,
    lock_of,
    make_private,
    memory_of,
    overlaps_itself,
    settle,
    write_to,
)
from shira.ops.plan import Plan

T = TypeVar("T")


def resident(
    weight: Tensor,
    plan: Plan,
    deltas: Sequence[Tensor],
    dtype: torch.dtype,
    product: Callable[[Tensor], T],
) -> T:
    """Compute a product with the weight while the deltas are inside.

    Args:
        weight: The base weight; the same bits as before once this returns or raises. If its memory
            is read-only or shared with other processes, a parameter gets memory of its own, and
            of another tensor a copy is multiplied.
        plan: Of the active supports on this weight.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        dtype: What the product wants. Another dtype than the weight's (autocast) means a cast
            copy, as torch itself makes one; the replacement values are rounded to the weight's
            dtype first, so that what is multiplied is the merged weight, cast.
        product: Called with a tensor of the weight's shape and of ``dtype``, which it must not
            keep. Called once, and no other thread writes to the weight meanwhile.

    Returns:
        What ``product`` returns.
    """
    delta = deltas[0] if plan.members is None else plan.combine(deltas)
    if weight.dtype != dtype or (not weight.is_contiguous() and overlaps_itself(weight)):
        return product(_cast_copy(weight, plan, delta, dtype))
    # .data: no version bump, so autograd's check of saved tensors stays quiet about a net no-op
    data = weight.data
    try:
        return write_to(data, delta_write(data, plan, delta), product)
    except SharedMemoryError:
        if not isinstance(weight, torch.nn.Parameter):
            return product(_cast_copy(weight, plan, delta, dtype))
    make_private(weight)
    return resident(weight, plan, deltas, dtype, product)


def delta_write(data: Tensor, plan: Plan, delta: Tensor) -> native.DeltaWrite | TorchWrite:
    """Return a write of ``round(original + delta)`` to the entries of a plan.

    Args:
        data: A weight whose entries do not share memory.
        plan: On this weight.
        delta: ``(k,)``.
    """
    kernels = compiled_for(data, delta)
    if kernels is not None and plan.gaps is not None:
        return native.DeltaWrite(kernels, data, plan.gaps, delta)
    return TorchWrite(data, plan, lambda originals: replacement(originals, delta))


class TorchWrite:
    """A `shira.ops.memory.Write` to the entries of a plan, through torch.

    Args:
        data: A weight whose entries do not share memory.
        plan: On this weight.
        new: Given what is there, ``(k,)``, returns what is to be there.

    Attributes:
        originals: ``(k,)``: what was there, once it is put in.
    """

    def __init__(self, data: Tensor, plan: Plan, new: Callable[[Tensor], Tensor]) -> None:
        self.memory, self.offsets, self.new = memory_of(data), plan.offsets().to(data.device), new
        self.originals: Tensor | None = None

    def put_in(self) -> None:
        """See `Write`."""
        self.originals = self.memory.index_select(0, self.offsets)
        self.memory.index_copy_(0, self.offsets, self.new(self.originals))

    def put_back(self) -> None:
        """See `Write`."""
        if self.originals is not None:
            self.memory.index_copy_(0, self.offsets, self.originals)


def compiled_for(data: Tensor, values: Tensor) -> native.Kernels | None:
    """Return the compiled kernels, if they are there and take such a weight and values for it.

    They give the same bits as torch.
    """
    fits = (
        data.is_cpu
        and data.dtype in native.KINDS
        and values.dtype != torch.float64
        and data.is_contiguous()
    )
    return native.load().library if fits else None


def _cast_copy(weight: Tensor, plan: Plan, delta: Tensor, dtype: torch.dtype) -> Tensor:
    settle(weight)
    with lock_of(weight):
        copy = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        copy.copy_(weight.detach())
        originals = memory_of(weight.detach()).index_select(0, plan.offsets())
    copy.view(-1).index_copy_(0, plan.flat(), replacement(originals, delta).to(dtype))
    return copy
