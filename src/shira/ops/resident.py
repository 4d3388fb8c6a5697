# SPDX-License-Identifier: Apache-2.0
"""The weight holds the adapter only while it is multiplied: `resident`.

On entry the k originals are read and the replacement values written in their place; on exit, also
by an exception, the originals are written back. So the base weight is pristine between calls, no
copy of it is made, and putting back is exact.

Two threads must not interleave on one weight: a lock per memory block keeps them apart. On an
accelerator the lock orders the launches, which is enough as long as both use one stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from shira.base import replacement
from shira.ops import native
from shira.ops.plan import Plan

# A fixed set of locks, chosen by address: nothing to register and nothing to leak. No code holds
# two of them at once.
_LOCKS = tuple(threading.Lock() for _ in range(61))


def lock_of(weight: Tensor) -> threading.Lock:
    """The lock that guards a weight's memory (shared by views and tied weights)."""
    return _LOCKS[(weight.untyped_storage().data_ptr() >> 6) % len(_LOCKS)]


def resident(
    weight: Tensor, plan: Plan, deltas: Sequence[Tensor], dtype: torch.dtype
) -> AbstractContextManager[Tensor]:
    """The weight with the deltas inside, for as long as the context lasts.

    Args:
        weight: The base weight; the same bits as before once the context is left.
        plan: Of the active supports on this weight.
        deltas: ``(k_i,)`` for each active adapter, scale included.
        dtype: What the product wants. Another dtype than the weight's (autocast) means a cast
            copy, as torch itself makes one; the replacement values are rounded to the weight's
            dtype first, so that what is multiplied is the merged weight, cast.

    Returns:
        A context of a tensor of the weight's shape and of ``dtype``; not to be kept.
    """
    delta = deltas[0] if plan.members is None else plan.combine(deltas)
    if weight.dtype == dtype:
        kernels = compiled_for(weight, delta)
        if kernels is not None and plan.gaps is not None:
            return _Compiled(kernels, weight, plan.gaps, delta)
        if not _overlaps_itself(weight):
            return _through_torch(weight, plan, delta)
    return nullcontext(_cast_copy(weight, plan, delta, dtype))


class _Compiled:
    """`resident` through the compiled kernels.

    A plain class: between large products the code and data of each Python step come from memory
    again, so steps count.
    """

    __slots__ = ("data", "delta", "gaps", "kernels", "lock", "originals")

    def __init__(
        self, kernels: native.Kernels, weight: Tensor, gaps: native.Gaps, delta: Tensor
    ) -> None:
        # .data: no version bump, so autograd's check of saved tensors stays quiet about a net no-op
        self.kernels, self.data, self.gaps, self.delta = kernels, weight.data, gaps, delta
        if delta.dtype != torch.float32 or not delta.is_contiguous():
            self.delta = delta.float().contiguous()

    def __enter__(self) -> Tensor:
        data = self.data
        self.lock = lock_of(data)
        self.lock.acquire()
        try:
            self.originals = self.kernels.enter(data, self.gaps, self.delta)
        except BaseException:
            self.lock.release()
            raise
        return data

    def __exit__(self, *_: object) -> None:
        try:
            self.kernels.leave(self.data, self.gaps, self.originals)
        finally:
            self.lock.release()


@contextmanager
def _through_torch(weight: Tensor, plan: Plan, delta: Tensor) -> Iterator[Tensor]:
    data = weight.data  # see _Compiled
    memory = memory_of(data)
    offsets = plan.offsets()
    with lock_of(data):
        originals = memory.index_select(0, offsets)
        new = replacement(originals, delta)
        try:
            memory.index_copy_(0, offsets, new)
            yield data
        finally:
            memory.index_copy_(0, offsets, originals)


def compiled_for(data: Tensor, values: Tensor) -> native.Kernels | None:
    """The compiled kernels, if they are there and take such a weight and values for it.

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
    flat = plan.flat()
    with lock_of(weight):
        copy = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        copy.copy_(weight.detach())
        originals = weight.detach()[_unravel(flat, weight.shape)]
    copy.view(-1).index_copy_(0, flat, replacement(originals, delta).to(dtype))
    return copy


def _unravel(flat: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    index: list[Tensor] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat = flat // size
    return tuple(reversed(index))


def memory_of(data: Tensor) -> Tensor:
    """The entries of a tensor in the order of memory, as a 1-D view."""
    if data.is_contiguous():
        return data.view(-1)
    extent = 1 + sum((n - 1) * step for n, step in zip(data.shape, data.stride(), strict=True))
    return data.as_strided((extent,), (1,))


def _overlaps_itself(weight: Tensor) -> bool:
    """Whether entries share memory (an expanded tensor): then nothing may be overwritten."""
    return any(step == 0 and n > 1 for n, step in zip(weight.shape, weight.stride(), strict=True))
