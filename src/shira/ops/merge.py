# SPDX-License-Identifier: Apache-2.0
"""Adapters written into a weight to stay, by their plan, and taken out again exactly.

As a `shira.ops.patch.Exchange`, but of a byte an entry and in one compiled pass: what is to be
there is computed as it is written, and what undoes it is the `Undo` that is noted with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from shira.base import replacement
from shira.ops.memory import (
    WriteCount,
    count_write,
    make_private,
    memory_of,
    offsets_of,
    one_write,
    take_back,
    write_to,
)
from shira.ops.native import DeltaWrite
from shira.ops.patch import Overwritten, restored
from shira.ops.plan import Plan, plan_for
from shira.ops.resident import TorchWrite, compiled_for, delta_write


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
        make_private(weight)
        write_to(weight.data, _Restoring(self, weight, commit), lambda data: None, lasting=True)

    def record(self, weight: Tensor) -> Overwritten:
        """Return what was overwritten, for `shira.ops.patch.base_at`; O(k).

        Args:
            weight: Into which the merge wrote; it may have been moved or cast since.
        """
        flat = self.plan.flat().to(weight.device)
        originals = self.originals.to(weight.device, weight.dtype)
        offsets = offsets_of(flat, self.plan.weight_shape, self.plan.stride)
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

    write: DeltaWrite | TorchWrite
    if earlier is None and check is None:
        write = delta_write(data, plan, delta)  # in one pass, if compiled
    else:
        write = TorchWrite(data, plan, new)

    def note(data: Tensor) -> None:
        assert write.originals is not None
        originals = originals_of(write.originals)
        count = count_write(weight, earlier.count if earlier else None)
        commit(Undo(plan, originals, count))

    write_to(data, _Merging(write, weight, lambda: commit(earlier)), note, lasting=True)


class _Merging:
    """The write of a merge; when it is put back, that is noted where the merge was."""

    def __init__(
        self, write: DeltaWrite | TorchWrite, weight: Tensor, undone: Callable[[], None]
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


class _Restoring:
    """The write of an unmerge: to undo it is to complete it, so that it is never left half done."""

    def __init__(self, undo: Undo, weight: Tensor, commit: Callable[[], None]) -> None:
        self.undo, self.weight, self.data, self.commit = undo, weight, weight.data, commit
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
