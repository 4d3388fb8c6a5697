# SPDX-License-Identifier: Apache-2.0
"""Writing adapters into a weight and taking them out again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shira.base import replacement
from shira.ops import Plan, plan_for
from shira.ops.memory import memory_of, write_to
from shira.ops.native import Entered
from shira.ops.private_memory import make_private
from shira.ops.resident import Overwritten, compiled_for, entered
from shira.ops.write_count import WriteCount, count_write, one_write, take_back


@dataclass(frozen=True, eq=False)
class Undo:
    """The originals of the entries that a merge has overwritten."""

    plan: Plan
    originals: Tensor
    """``(k,)`` in the dtype that the weight had."""
    count: WriteCount

    def restore(self, weight: Tensor, commit: Callable[[], None]) -> None:
        """Put the originals back; the weight may have been moved or cast since.

        Args:
            weight: Into which the merge wrote.
            commit: Notes that the originals are back; called once or twice. An interrupt does not
                keep the two apart: they are then both done before it is raised.
        """
        write = _Restoring(self, weight, commit)
        write_to(write.data, write, lambda data: None, lasting=True)


class _Restoring:
    """The write of an unmerge: to undo it is to complete it, so that it is never left half done."""

    def __init__(self, undo: Undo, weight: Tensor, commit: Callable[[], None]) -> None:
        self.undo, self.weight, self.commit = undo, weight, commit
        make_private(weight)
        self.data = weight.data
        self.originals = undo.originals.to(weight.device, weight.dtype)

    def put_in(self) -> None:
        """See `Write`."""
        plan, kernels = self.undo.plan, compiled_for(self.data, self.originals)
        if kernels is not None and plan.gaps is not None:
            kernels.leave(self.data, plan.gaps, self.originals)
        else:
            offsets = plan.offsets().to(self.data.device)
            memory_of(self.data).index_copy_(0, offsets, self.originals)
        take_back(self.weight, self.undo.count)
        self.commit()

    put_back = put_in


def merge_into(
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    earlier: Undo | None,
    commit: Callable[[Undo | None], None],
    check: Callable[[Tensor], None] | None = None,
) -> None:
    """Overwrite the entries of adapters with their replacement values, and let autograd know.

    Several adapters are summed before the one rounding, so always from the originals. If anything
    raises, an interrupt included, the weight is as it was.

    Args:
        weight: The base weight, perhaps with other adapters merged already.
        deltas: ``(k_i,)`` for each adapter that is to be in the weight afterwards, those that are
            in it already among them.
        indices: int32 ``(2, k_i)`` for each, or packed.
        earlier: Of the adapters that are in it now.
        commit: Notes what undoes this merge; called with ``earlier`` when that counts again.
        check: Is given all replacement values ``(k,)`` before anything is written, and may raise.
    """
    plan = plan_for(indices, weight.shape, weight.stride())
    delta = plan.combine(deltas).detach()
    make_private(weight)
    data = weight.data

    def new(there: Tensor) -> Tensor:
        result = replacement(_originals(there, plan, earlier, data), delta)
        if check is not None:
            check(result)
        return result

    write: Entered | Overwritten
    if earlier is None and check is None:
        write = entered(data, plan, delta)  # in one pass, if compiled
    else:
        write = Overwritten(data, plan.offsets().to(data.device), new)

    def note(data: Tensor) -> None:
        there = write.originals
        assert there is not None
        originals = _originals(there, plan, earlier, data)
        count = count_write(weight, earlier.count if earlier else None)
        commit(Undo(plan, originals, count))

    write_to(data, _Merging(write, weight, partial(commit, earlier)), note, lasting=True)


class _Merging:
    """The write of a merge; when it is put back, that is noted where the merge was."""

    def __init__(
        self, write: Entered | Overwritten, weight: Tensor, undone: Callable[[], None]
    ) -> None:
        self.write, self.weight, self.undone = write, weight, undone
        self.count = one_write(weight)

    def put_in(self) -> None:
        """See `Write`."""
        self.write.put_in()

    def put_back(self) -> None:
        """See `Write`."""
        self.write.put_back()
        take_back(self.weight, self.count)
        self.undone()


def _originals(there: Tensor, plan: Plan, earlier: Undo | None, data: Tensor) -> Tensor:
    """Return ``(k,)``: what the base holds at a plan's entries, given what is there now."""
    if earlier is None:
        return there
    # Entries of the earlier merge hold replacements now; their originals are in its undo. All of
    # them are in the union, since adapters that were merged stay merged.
    offsets, originals = plan.offsets().to(data.device), there.clone()
    order = torch.argsort(offsets)
    held = earlier.plan.offsets().to(data.device)
    place = order[torch.searchsorted(offsets[order], held)]
    originals[place] = earlier.originals.to(data.device, data.dtype)
    return originals
