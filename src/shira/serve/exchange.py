# SPDX-License-Identifier: Apache-2.0
"""What an adapter changes in one storage of a rank, checked before anything is written.

Built on `shira.ops.patch` and `shira.switch.plan`, which make and write patches: a whole storage is
a weight of one dimension to them. `Change.check` only reads, so that all ranks can agree before
the first of them writes. Everything costs O(k).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shira.base import replacement
from shira.delta import SparseDelta
from shira.errors import SwitchError
from shira.ops.patch import Exchange, Patch, base_at, same_bits
from shira.support import Support
from shira.switch.plan import Entry, make_entry, make_patch


class Part(NamedTuple):
    """What an adapter changes in one storage.

    Attributes:
        storage: 1-D view of the whole storage.
        entry: Its deltas, and the patch at scale 1.
    """

    storage: Tensor
    entry: Entry

    @property
    def nnz(self) -> int:
        """How many entries."""
        return self.entry.patch.nnz

    @property
    def positions(self) -> Tensor:
        """``(k,)`` int32 or int64, increasing."""
        return self.entry.patch.offsets

    def with_values(self, values: Tensor) -> Part:
        """Other deltas ``(k,)`` at the same positions, which stay the same tensor.

        Raises:
            AdapterError: If a finite value becomes infinite or NaN.
        """
        old, values = self.entry.patch, values.to(self.storage.device)
        patch = make_patch(old.offsets, old.originals, replacement(old.originals, values))
        return Part(self.storage, Entry(values, patch))

    def anew(self) -> Part:
        """The same deltas on the values that the storage holds now, as its base."""
        assert self.entry.values is not None  # whole tensors are not served
        return make_part(self.storage, self.entry.patch.offsets, self.entry.values, None)


def make_part(storage: Tensor, positions: Tensor, values: Tensor, active: Patch | None) -> Part:
    """Deltas at positions of a storage.

    Args:
        storage: 1-D view of the whole storage.
        positions: ``(k,)`` integers, increasing.
        values: ``(k,)`` deltas.
        active: What is in the storage now.

    Raises:
        AdapterError: If a finite value becomes infinite or NaN.
    """
    support = Support._trusted((storage.numel(),), positions.to(storage.device))
    delta = SparseDelta(support, values.to(storage.device))
    return Part(storage, make_entry(delta, storage, active)[0])


class Change(NamedTuple):
    """A prepared exchange of values in one storage.

    Attributes:
        storage: 1-D view of the whole storage.
        before: What is in it now; None for the base.
        after: What shall be.
    """

    storage: Tensor
    before: Patch | None
    after: Patch | None

    def check(self) -> None:
        """Compare what stands there with what should, bit for bit; writes nothing.

        Raises:
            SwitchError: If something else has written to the weights.
        """
        found, expected = [], []
        if self.before is not None:
            found.append(self.storage.index_select(0, self.before.offsets))
            expected.append(self.before.replacement)
        if self.after is not None:
            found.append(base_at(self.storage, self.after.offsets, self.before))
            expected.append(self.after.originals)
        if not all(map(same_bits, found, expected)):
            raise SwitchError(
                "the weights were changed by something else since adapters were loaded (reloaded "
                "or trained on?), so that originals are not known. If they are a whole base "
                "again, rebase: adapters then count from it, and what was active is applied anew"
            )

    def apply(self) -> None:
        """Write what shall be there."""
        Exchange(self.storage, self.before, self.after, check=False).run()

    def roll_back(self) -> None:
        """Write what was there, however far `apply` has come."""
        Exchange(self.storage, self.after, self.before, check=False).run()
