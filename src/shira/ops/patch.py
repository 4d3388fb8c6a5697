# SPDX-License-Identifier: Apache-2.0
"""`Patch`: what an adapter puts into one weight, and what it takes away; from one to another.

A patch is ready to be written: places in the weight's memory, in ascending order, the originals
and the replacement values. `Exchange` goes from one to another::

    before = None     ->  after = a      a's replacements are written
    before = a        ->  after = None   a's originals are put back
    before = a        ->  after = b      both, in one walk over the memory

Nothing is ever added or subtracted. Each entry is compared, bit for bit, with what it must hold
before it is overwritten, so a weight that somebody else has written to in between is noticed and
left alone. A native walk does this with one visit to each cache line; without it, and on other
devices than the CPU, plain torch does. An interrupt leaves the weight as it was; `Exchanges` does
the same for several weights, of which all or none are wanted.

Whoever reads a base that has patches in it asks `base_at`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shira.errors import SwitchError
from shira.ops import native
from shira.ops.memory import lock_of, memory_of, settle, write_to

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Overwritten:
    """Entries of one weight that were overwritten, and what the base holds there."""

    offsets: Tensor
    """int32 or int64 ``(k,)``: places in the weight's memory, counted in entries from its first,
    strictly ascending. All tensors are contiguous, and of one weight."""
    originals: Tensor
    """``(k,)`` in the weight's dtype: what the base holds there."""

    @property
    def nnz(self) -> int:
        """The number of entries."""
        return self.offsets.numel()


@dataclass(frozen=True, eq=False)
class Patch(Overwritten):
    """Entries of one weight, ready to be written."""

    replacement: Tensor
    """``(k,)`` in the weight's dtype: what the adapter puts there."""


class ChangedEntryError(SwitchError):
    """An entry does not hold what it should; nothing of this weight was changed.

    Attributes:
        exchange: The exchange that found it.
        offset: Place of the entry in the weight's memory.
    """

    def __init__(self, exchange: Exchange, offset: int) -> None:
        super().__init__(f"the entry at offset {offset} was changed by somebody else")
        self.exchange, self.offset = exchange, offset


def base_at(weight: Tensor, offsets: Tensor, *records: Overwritten | None) -> Tensor:
    """Return the base's values, ``(k,)``, at places in a weight's memory, in any order.

    Whatever is in it now: ``records`` are what was overwritten, the latest first, on its device.
    """
    settle(weight)
    return restored(memory_of(weight.data).index_select(0, offsets), offsets, *records)


def restored(values: Tensor, offsets: Tensor, *records: Overwritten | None) -> Tensor:
    """Put originals, in place, into values that were read at places in memory; as `base_at`."""
    for record in records:
        if record is not None and record.nnz and offsets.numel():
            wanted = offsets.to(record.offsets.dtype)
            at = torch.searchsorted(record.offsets, wanted).clamp_(max=record.nnz - 1)
            covered = record.offsets[at] == wanted
            values[covered] = record.originals[at[covered]].to(values.dtype)
    return values


class Exchange:
    """A patch taken out of a weight and another put in, in place; None stands for the base.

    A `shira.ops.memory.Write`, made before anything is written. Without ``check``, whatever the
    entries hold is overwritten.
    """

    def __init__(
        self, weight: Tensor, before: Patch | None, after: Patch | None, *, check: bool = True
    ) -> None:
        self.weight, self.before, self.after, self.check = weight, before, after, check
        self._done = ctypes.c_int(0)
        self._there: list[tuple[Tensor, Tensor]] = []

    def run(self) -> None:
        """Exchange the patches, or change nothing: after an interrupt or a `ChangedEntryError`."""
        if self.before is not None or self.after is not None:
            write_to(self.weight, self, lambda memory: None, lasting=True)

    def compare(self) -> None:
        """Raise the `ChangedEntryError` that `run` would; writes nothing."""
        memory = memory_of(self.weight.data)
        settle(self.weight)
        if self.before is not None:
            found = memory.index_select(0, self.before.offsets)
            self._compare(self.before.offsets, found, self.before.replacement)
        if self.after is not None:
            found = base_at(self.weight, self.after.offsets, self.before)
            self._compare(self.after.offsets, found, self.after.originals)

    def roll_back(self) -> None:
        """Give the entries the bits of before, if `run` has changed them."""
        settle(self.weight)
        with lock_of(self.weight):
            self.put_back()

    def put_in(self) -> None:
        """See `Write`."""
        # Not within torch.inference_mode: an interrupt at its edge leaves its guard behind, which,
        # when the traceback goes, sets the caller's gradient mode to what it was here.
        memory, kernels = memory_of(self.weight.data), self._kernels()
        if kernels is None:
            self._put_in_with_torch(_bits(memory))
            return
        before, after = _parts(self.before), _parts(self.after)
        wrong = kernels.swap(memory, before, after, self.check, self._done)
        if wrong >= 0:
            raise ChangedEntryError(self, wrong)

    def put_back(self) -> None:
        """See `Write`."""
        memory, kernels = memory_of(self.weight.data), self._kernels()
        if kernels is not None and self._done.value:
            kernels.swap(memory, _parts(self.after), _parts(self.before), False, self._done)
        for at, bits in self._there:
            _bits(memory).index_copy_(0, at, bits)
        self._done.value, self._there = 0, []

    def _kernels(self) -> native.Kernels | None:
        """Return the compiled walk, if there is one; there is none for buffers of single bytes."""
        walks = self.weight.device.type == "cpu" and self.weight.element_size() > 1
        return native.load().library if walks else None

    def _put_in_with_torch(self, memory: Tensor) -> None:
        """Write to a 1-D memory, twice to the entries that both patches have."""
        out, in_ = self.before, self.after
        steps = [] if out is None else [(out.offsets.long(), out.replacement, out.originals)]
        steps += [] if in_ is None else [(in_.offsets.long(), in_.originals, in_.replacement)]
        self._there = [(at, memory.index_select(0, at)) for at, _, _ in steps]
        for at, expected, new in steps:
            if self.check:
                self._compare(at, memory.index_select(0, at), expected)
            memory.index_copy_(0, at, _bits(new))

    def _compare(self, at: Tensor, found: Tensor, expected: Tensor) -> None:
        wrong = _bits(found) != _bits(expected)
        if bool(wrong.any()):
            raise ChangedEntryError(self, int(at[wrong][0]))


class Exchanges:
    """Exchanges on several weights, none run yet, of which all or none are to last."""

    def __init__(self, exchanges: Iterable[Exchange]) -> None:
        self._exchanges = tuple(exchanges)

    def run(self) -> None:
        """Run all, one after the other; if one raises, or an interrupt comes, roll all back."""
        try:
            for exchange in self._exchanges:
                exchange.run()
        except BaseException:
            self.roll_back()
            raise

    def compare(self) -> None:
        """Compare the entries of all, as `Exchange.compare`."""
        for exchange in self._exchanges:
            exchange.compare()

    def roll_back(self) -> None:
        """Put back what was exchanged, however far that came; may be called again."""
        for exchange in reversed(self._exchanges):
            exchange.roll_back()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors of one dtype hold the same bits, NaN and signs of zero included."""
    return torch.equal(_bits(a.contiguous()), _bits(b.contiguous()))


def _parts(patch: Patch | None) -> tuple[Tensor, Tensor, Tensor] | None:
    return None if patch is None else (patch.offsets, patch.originals, patch.replacement)


def _bits(tensor: Tensor) -> Tensor:
    """Return the memory as integers, so that NaNs and signs of zero compare as what they are."""
    return tensor.view(_BITS[tensor.element_size()])
