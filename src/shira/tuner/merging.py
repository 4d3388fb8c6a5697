# SPDX-License-Identifier: Apache-2.0
"""Writing adapters into a weight and taking them out again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.base import replacement
from shira.ops import Plan, plan_for
from shira.ops.resident import compiled_for, lock_of, memory_of
from shira.ops.write_count import WriteCount, count_write, take_back


@dataclass(frozen=True, eq=False)
class Undo:
    """The originals of the entries that a merge has overwritten."""

    plan: Plan
    originals: Tensor
    """``(k,)`` in the dtype that the weight had."""
    count: WriteCount

    def restore(self, weight: Tensor) -> None:
        """Put the originals back; the weight may have been moved or cast since."""
        data = weight.data
        originals = self.originals.to(weight.device, weight.dtype)
        kernels = compiled_for(data, originals)
        with lock_of(weight):
            if kernels is not None and self.plan.gaps is not None:
                kernels.leave(data, self.plan.gaps, originals)
            else:
                _overwrite(data, self.plan, originals)
        take_back(weight, self.count)


def merge_into(
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    earlier: Undo | None,
    check: Callable[[Tensor], None] | None = None,
) -> Undo:
    """Overwrite the entries of adapters with their replacement values, and let autograd know.

    Several adapters are summed before the one rounding, so always from the originals.

    Args:
        weight: The base weight, perhaps with other adapters merged already.
        deltas: ``(k_i,)`` for each adapter that is to be in the weight afterwards, those that are
            in it already among them.
        indices: int32 ``(2, k_i)`` for each, or packed.
        earlier: Of the adapters that are in it now.
        check: Is given all replacement values ``(k,)`` before anything is written, and may raise.
    """
    plan = plan_for(indices, weight.shape, weight.stride())
    delta = plan.combine(deltas).detach()
    data = weight.data
    kernels = compiled_for(data, delta) if earlier is None and check is None else None
    if kernels is not None and plan.gaps is not None:  # in one pass
        delta = delta.float().contiguous()
        with lock_of(weight):
            originals = kernels.enter(data, plan.gaps, delta)
    else:
        originals = _originals(data, plan, earlier)
        new = replacement(originals, delta)
        if check is not None:
            check(new)
        with lock_of(weight):
            _overwrite(data, plan, new)
    return Undo(plan, originals, count_write(weight, earlier.count if earlier else None))


def _originals(data: Tensor, plan: Plan, earlier: Undo | None) -> Tensor:
    """``(k,)``: what the base holds at the entries of a plan."""
    offsets = plan.offsets().to(data.device)
    originals = memory_of(data).index_select(0, offsets)
    if earlier is not None:
        # Entries of the earlier merge hold replacements now; their originals are in its undo. All
        # of them are in the union, since adapters that were merged stay merged.
        order = torch.argsort(offsets)
        held = earlier.plan.offsets().to(data.device)
        place = order[torch.searchsorted(offsets[order], held)]
        originals[place] = earlier.originals.to(data.device, data.dtype)
    return originals


def _overwrite(data: Tensor, plan: Plan, values: Tensor) -> None:
    """Write ``(k,)`` values at the plan's entries, in place."""
    memory_of(data).index_copy_(0, plan.offsets().to(data.device), values)
