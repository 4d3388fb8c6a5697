# SPDX-License-Identifier: Apache-2.0
"""Writing adapters into a weight and taking them out again, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.delta import replacement
from shira.ops import Plan, plan_for
from shira.ops.resident import lock_of, memory_of


@dataclass(frozen=True, eq=False)
class Undo:
    """The originals of the entries that a merge has overwritten."""

    plan: Plan
    originals: Tensor
    """``(k,)`` in the dtype that the weight had."""
    version: int | None
    """Autograd's write counter of the weight before the first merge, or None if it has none."""
    merges: int = 1
    """Merges since then, each of which counted one write."""

    def restore(self, weight: Tensor) -> None:
        """Put the originals back; the weight may have been moved or cast since."""
        overwrite(weight, self.plan, self.originals.to(weight.device, weight.dtype))
        # The bits are those of before: a graph from before the merge may run backward again.
        if self.version is not None and version_of(weight) == self.version + self.merges:
            torch._C._autograd._unsafe_set_version_counter((weight,), (self.version,))


def version_of(weight: Tensor) -> int | None:
    """Autograd's count of writes to a tensor; None for inference tensors, which have none."""
    return None if weight.is_inference() else weight._version


def merge_into(
    weight: Tensor, plan: Plan, originals: Tensor, new: Tensor, earlier: Undo | None
) -> Undo:
    """Overwrite the entries of a plan, and let autograd know.

    A graph from before, whose backward would multiply with the merged weight, then raises torch's
    own error instead of giving a wrong gradient.
    """
    undo = Undo(plan, originals, version_of(weight))
    if earlier is not None:
        undo = Undo(plan, originals, earlier.version, earlier.merges + 1)
    overwrite(weight, plan, new)
    if undo.version is not None:
        torch.autograd.graph.increment_version(weight)
    return undo


def prepare(
    weight: Tensor, deltas: Sequence[Tensor], indices: Sequence[Tensor], undo: Undo | None
) -> tuple[Plan, Tensor, Tensor]:
    """What a merge would write; changes nothing.

    Args:
        weight: The base weight, perhaps with other adapters merged already.
        deltas: ``(k_i,)`` for each adapter that is to be in the weight afterwards.
        indices: int32 ``(2, k_i)`` for each.
        undo: Of the adapters that are in it now.

    Returns:
        The plan of the union, the originals ``(k,)`` and the replacement values ``(k,)``.
    """
    plan = plan_for(indices, weight.shape, weight.stride())
    offsets = plan.offsets().to(weight.device)
    originals = memory_of(weight.data).index_select(0, offsets)
    if undo is not None:
        # Entries of the earlier merge hold replacements now; their originals are in its undo. All
        # of them are in the union, since adapters that were merged stay merged.
        order = torch.argsort(offsets)
        place = order[torch.searchsorted(offsets[order], undo.plan.offsets().to(weight.device))]
        originals[place] = undo.originals.to(weight.device, weight.dtype)
    new = replacement(originals, plan.combine(deltas))
    return plan, originals, new


def overwrite(weight: Tensor, plan: Plan, values: Tensor) -> None:
    """Write ``(k,)`` values at the plan's entries, in place, under the weight's lock."""
    with lock_of(weight):
        memory_of(weight.data).index_copy_(0, plan.offsets().to(weight.device), values)
