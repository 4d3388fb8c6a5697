# SPDX-License-Identifier: Apache-2.0
"""`Patch`: what an adapter puts into one weight, and what it takes away; from one to another.

A patch is ready to be written: places in the weight's memory, in ascending order, the originals
and the replacement values. `exchange` goes from one to another::

    before = None     ->  after = a      a's replacements are written
    before = a        ->  after = None   a's originals are put back
    before = a        ->  after = b      both, in one walk over the memory

Nothing is ever added or subtracted. Each entry is compared, bit for bit, with what it must hold
before it is overwritten, so a weight that somebody else has written to in between is noticed and
left alone. A native walk does this with one visit to each cache line; without it, and on other
devices than the CPU, plain torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.errors import SwitchError
from shira.ops import native
from shira.ops.resident import lock_of, memory_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Patch:
    """Entries of one weight, ready to be written."""

    offsets: Tensor
    """int32 or int64 ``(k,)``: places in the weight's memory, counted in entries from its first,
    strictly ascending. All three are contiguous, and of one weight."""
    originals: Tensor
    """``(k,)`` in the weight's dtype: what the base holds there."""
    replacement: Tensor
    """``(k,)`` in the weight's dtype: what the adapter puts there."""

    @property
    def nnz(self) -> int:
        """How many entries."""
        return self.offsets.numel()


class ChangedEntryError(SwitchError):
    """An entry does not hold what it should; nothing of this weight was changed.

    Attributes:
        offset: Place of the entry in the weight's memory.
    """

    def __init__(self, offset: int) -> None:
        super().__init__(f"the entry at offset {offset} was changed by somebody else")
        self.offset = offset


def memory_offsets(flat: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Places in memory of entries that are named by flat, row-major indices.

    Args:
        flat: int32 or int64 ``(k,)``, each in ``[0, numel)``.
        shape: Of the weight.
        stride: Of the weight, in entries.

    Returns:
        ``(k,)``; ``flat`` itself for a contiguous weight, else int64.
    """
    expected, contiguous = 1, True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        contiguous &= size == 1 or step == expected
        expected *= size
    if contiguous:
        return flat
    flat = flat.long()
    offsets = torch.zeros_like(flat)
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        offsets += flat % size * step
        flat = flat // size
    return offsets


def exchange(
    weight: Tensor, before: Patch | None, after: Patch | None, *, check: bool = True
) -> None:
    """Take one patch out of a weight and put another in, in place.

    Args:
        weight: Of the patches' dtype and device; its memory stays where it is.
        before: What is in it now; None for the base.
        after: What is to be in it; None for the base.
        check: Compare before writing. Without, whatever the entries hold is overwritten, which
            also brings a weight back in which only a part of an exchange was done.

    Raises:
        ChangedEntryError: If an entry holds other bits than it should; nothing was changed.
    """
    if before is None and after is None:
        return
    kernels = native.load().library if weight.device.type == "cpu" else None
    with lock_of(weight), torch.no_grad(), torch.inference_mode(weight.is_inference()):
        memory = memory_of(weight.data)
        if kernels is None:
            exchange_with_torch(_bits(memory), before, after, check)
        elif (wrong := kernels.swap(memory, _parts(before), _parts(after), check)) >= 0:
            raise ChangedEntryError(wrong)


def _parts(patch: Patch | None) -> tuple[Tensor, Tensor, Tensor] | None:
    return None if patch is None else (patch.offsets, patch.originals, patch.replacement)


def exchange_with_torch(
    memory: Tensor, before: Patch | None, after: Patch | None, check: bool
) -> None:
    """`exchange` in plain torch, on any device; ``memory`` is 1-D, seen as integers.

    Entries that both patches have are written twice here.
    """
    if before is not None:
        at = before.offsets.long()
        if check:
            _compare(memory, at, _bits(before.replacement))
        memory.index_copy_(0, at, _bits(before.originals))
    if after is not None:
        at_after = after.offsets.long()
        try:
            if check:
                _compare(memory, at_after, _bits(after.originals))
        except ChangedEntryError:
            if before is not None:
                memory.index_copy_(0, at, _bits(before.replacement))
            raise
        memory.index_copy_(0, at_after, _bits(after.replacement))


def _compare(memory: Tensor, at: Tensor, expected: Tensor) -> None:
    found = memory.index_select(0, at)
    if not torch.equal(found, expected):
        raise ChangedEntryError(int(at[found != expected][0]))


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, so that NaNs and signs of zero compare as what they are."""
    return tensor.view(_BITS[tensor.element_size()])
