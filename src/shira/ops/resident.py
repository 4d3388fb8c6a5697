# SPDX-License-Identifier: Apache-2.0
"""Deltas in a weight, by their plan: for one product (`resident`), or to stay (`merge_into`).

Before a product the k originals are read and the replacement values written in their place; after
it, also after an exception or an interrupt, the originals are written back (`write_to`). So the
base weight is pristine between calls, no copy of it is made, and putting back is exact.

Merged adapters stay until their `Undo` is restored. As a `shira.ops.patch.Exchange`, but of a byte
an entry and in one compiled pass: what is to be there is computed as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from shira.base import replacement
from shira.ops import native
from shira.ops.memory import (
    SharedMemoryError,
    Write,
    WriteCount,
    count_write,
    lock_of,
    make_private,
    memory_of,
    offsets_of,
    overlaps_itself,
    settle,
    take_back,
    write_to,
)
from shira.ops.patch import Overwritten, restored
from shira.ops.plan import Plan, plan_for

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
    whole = plan.members is None and deltas[0].numel() == plan.nnz
    delta = deltas[0] if whole else plan.combine(deltas)
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


def delta_write(
    data: Tensor, plan: Plan, delta: Tensor, originals: Tensor | None = None
) -> native.DeltaWrite | TorchWrite:
    """Return a write of ``round(original + delta)`` to a plan's entries, which share no memory.

    Given ``originals``, the replacement values are there already, and only to be undone.
    """
    if (
        plan.gaps is not None
        and data.is_cpu
        and data.dtype in native.KINDS
        and delta.dtype != torch.float64
        and data.is_contiguous()
        and (kernels := native.load().library) is not None
    ):  # the same bits as through torch
        return native.DeltaWrite(kernels, data, plan.gaps, delta, originals)
    return TorchWrite(data, plan, lambda there: replacement(there, delta), originals)


class TorchWrite:
    """A `shira.ops.memory.Write` to the entries of a plan, through torch.

    ``new`` is given what is there, ``(k,)``, and returns what is to be there.
    """

    def __init__(
        self,
        data: Tensor,
        plan: Plan,
        new: Callable[[Tensor], Tensor],
        originals: Tensor | None = None,
    ) -> None:
        if data.stride() == plan.stride and data.device == plan.device:
            self.offsets = plan.offsets()
        else:  # moved or laid out anew since the plan was made
            flat = plan.flat().to(data.device)
            self.offsets = offsets_of(flat, data.shape, data.stride())
        self.memory = memory_of(data)
        self.new, self.originals = new, originals

    def put_in(self) -> None:
        """See `Write`."""
        self.originals = self.memory.index_select(0, self.offsets)
        self.memory.index_copy_(0, self.offsets, self.new(self.originals))

    def put_back(self) -> None:
        """See `Write`."""
        if self.originals is not None:
            self.memory.index_copy_(0, self.offsets, self.originals)


def _cast_copy(weight: Tensor, plan: Plan, delta: Tensor, dtype: torch.dtype) -> Tensor:
    settle(weight)
    with lock_of(weight):
        copy = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        copy.copy_(weight.detach())
        originals = memory_of(weight.detach()).index_select(0, plan.offsets())
    copy.view(-1).index_copy_(0, plan.flat(), replacement(originals, delta).to(dtype))
    return copy


@dataclass(frozen=True, eq=False)
class Undo:
    """The originals of the entries that a merge has overwritten."""

    plan: Plan
    originals: Tensor
    """``(k,)`` in the dtype that the weight had."""
    count: WriteCount

    def restore(self, weight: Tensor, commit: Callable[[], None]) -> None:
        """Put the originals back; the weight may have been moved, cast or laid out anew since.

        ``commit`` notes that; called once or twice. An interrupt does not keep the two apart: they
        are then both done before it is raised.
        """
        make_private(weight)
        originals = self.originals.to(weight.device, weight.dtype)
        merged = delta_write(weight.data, self.plan, originals[:0], originals)
        undoing = _Undoing(merged, weight, self.count, commit)
        write_to(weight.data, undoing, lambda data: None, lasting=True)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Undo:
        """Return the same of a weight that ``move`` has moved or cast, rounded as the base is."""
        return replace(self, originals=move(self.originals))

    def record(self, weight: Tensor) -> Overwritten:
        """Return what was overwritten, of the weight as it is now: see `restore`. O(k)."""
        flat = self.plan.flat().to(weight.device)
        originals = self.originals.to(weight.device, weight.dtype)
        offsets = offsets_of(flat, weight.shape, weight.stride())
        if offsets is not flat:
            offsets, order = offsets.sort()
            originals = originals[order]
        return Overwritten(offsets, originals)


def merge_into(
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    earlier: Undo | None,
    commit: Callable[[Undo | None], None],
    check: Callable[[Tensor], None] | None = None,
) -> None:
    """Overwrite the entries of adapters with their replacement values, and let autograd know.

    Several adapters are summed before the one rounding, so always from the originals: deltas and
    indices are those of all that are to be in it, ``earlier`` undoes those that are in it now. If
    anything raises, an interrupt included, the weight is as it was. ``commit`` notes what undoes
    this merge, and is called with ``earlier`` when that counts again; ``check`` is given all
    replacement values ``(k,)`` before anything is written, and may raise.
    """
    plan = plan_for(indices, weight.shape, weight.stride())
    delta = plan.combine(deltas).detach()
    make_private(weight)
    data = weight.data

    def originals_of(there: Tensor) -> Tensor:
        if earlier is None:
            return there
        # Entries of the earlier merge hold replacements now. All of them are in this plan too,
        # since adapters that were merged stay merged.
        return restored(there.clone(), plan.offsets().to(data.device), earlier.record(data))

    def new(there: Tensor) -> Tensor:
        result = replacement(originals_of(there), delta)
        if check is not None:
            check(result)
        return result

    one_pass = earlier is None and check is None
    write = delta_write(data, plan, delta) if one_pass else TorchWrite(data, plan, new)

    def note(data: Tensor) -> None:
        assert write.originals is not None
        originals = originals_of(write.originals)
        count = count_write(weight, earlier.count if earlier else None)
        commit(Undo(plan, originals, count))

    counted = WriteCount(None if weight.is_inference() else weight._version, 1)
    write_to(data, _Noted(write, weight, counted, lambda: commit(earlier)), note, lasting=True)


class _Noted:
    """A write of a merge; that it is put back is noted where it was noted, and with autograd."""

    def __init__(
        self, write: Write, weight: Tensor, count: WriteCount, undone: Callable[[], None]
    ) -> None:
        self.write, self.weight, self.count, self.undone = write, weight, count, undone

    def put_in(self) -> None:
        """See `Write`."""
        self.write.put_in()

    def put_back(self) -> None:
        """See `Write`."""
        self.write.put_back()
        take_back(self.weight, self.count)
        self.undone()


class _Undoing(_Noted):
    """The undoing of a merge; to undo it is to complete it, so that it is never left half done."""

    put_in = _Noted.put_back
