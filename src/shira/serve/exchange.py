# SPDX-License-Identifier: Apache-2.0
"""Values at positions of a storage: what to write to switch, what to keep to undo it exactly.

A `Part` is what one adapter changes in one storage of a rank. `plan` compares what is active in
that storage with what shall be, reads and computes, and writes nothing; the `Change` that it
returns writes each position of the union once, or puts back what was there. Originals are kept and
put back, never recomputed. Everything costs O(k); only `Change.apply` and `Change.roll_back` write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shira.delta import SparseDelta, accumulation_dtype, replacement
from shira.errors import ServeError
from shira.support import Support


class Part(NamedTuple):
    """What an adapter changes in one storage.

    Attributes:
        storage: 1-D view of the whole storage.
        delta: Its support's shape is ``(storage.numel(),)``.
    """

    storage: Tensor
    delta: SparseDelta


class Undo(NamedTuple):
    """What is active in one storage, and how to take it back.

    Attributes:
        storage: 1-D view of the whole storage.
        support: Positions that hold other values than the base's.
        original: ``(k,)`` the base's values there.
        put: ``(k,)`` what was written over them.
    """

    storage: Tensor
    support: Support
    original: Tensor
    put: Tensor

    def originals_at(self, positions: Support, current: Tensor) -> Tensor:
        """The base's values at positions, given the current ones there ``(n,)``."""
        at = self.support.positions_of(positions)
        return torch.where(at >= 0, self.original[at.clamp_(min=0)], current)


class Change(NamedTuple):
    """A prepared exchange of values in one storage.

    Attributes:
        storage: 1-D view of the whole storage.
        positions: int64 ``(u,)``, each position that changes hands.
        new: ``(u,)`` what will stand there.
        before: ``(u,)`` what stands there now.
        undo: What is active afterwards; None if nothing is.
    """

    storage: Tensor
    positions: Tensor
    new: Tensor
    before: Tensor
    undo: Undo | None

    def apply(self) -> None:
        """Write the new values."""
        self.storage.index_copy_(0, self.positions, self.new)

    def roll_back(self) -> None:
        """Write back what stood there when the change was prepared."""
        self.storage.index_copy_(0, self.positions, self.before)


def combined(parts: Sequence[tuple[SparseDelta, float]]) -> SparseDelta:
    """Several deltas of one storage with a scale each, summed in their order in float32.

    One delta at scale 1 is returned as it is.

    Args:
        parts: At least one, of equal shape; float64 values make the sum float64.
    """
    (first, scale), rest = parts[0], parts[1:]
    if not rest and scale == 1.0:
        return first
    wide = accumulation_dtype(*(delta.values.dtype for delta, _ in parts))
    total = SparseDelta(first.support, first.values.to(wide) * scale)
    for delta, scale in rest:
        union = total.support.union(delta.support)
        values = torch.zeros(union.nnz, dtype=wide, device=total.values.device)
        values[union.positions_of(total.support)] = total.values
        values[union.positions_of(delta.support)] += delta.values.to(wide) * scale
        total = SparseDelta(union, values)
    return total


def plan(storage: Tensor, undo: Undo | None, wanted: SparseDelta | None) -> Change:
    """What to write so that exactly ``wanted`` is active in a storage.

    Args:
        storage: 1-D view of the whole storage.
        undo: What is active in it now.
        wanted: What shall be; None for the base.

    Raises:
        ServeError: If the storage does not hold what was put there: something else wrote to it.
    """
    none = torch.empty(0, dtype=torch.int64, device=storage.device)
    nothing = Support._trusted((storage.numel(),), none)
    leaving = undo.support if undo else nothing
    entering = wanted.support if wanted else nothing
    union = leaving.union(entering)
    positions = union.indices.long()
    before = storage[positions]
    original = before
    if undo:
        if not same_bits(before[union.positions_of(leaving)], undo.put):
            raise ServeError(
                "the weights were changed while an adapter was active (reloaded or updated?), so "
                "it cannot be taken back. If they are a complete base again, rebase: what was "
                "active is applied to it anew"
            )
        original = undo.originals_at(union, before)
    if wanted is None:
        return Change(storage, positions, original, before, None)
    at = union.positions_of(entering)
    kept = original[at]
    put = replacement(kept, wanted.values)
    new = original.clone()
    new[at] = put
    return Change(storage, positions, new, before, Undo(storage, entering, kept, put))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN and signs of zero included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
