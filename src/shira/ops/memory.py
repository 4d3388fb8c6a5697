# SPDX-License-Identifier: Apache-2.0
"""A weight's memory: where its entries are, who may write there, and writes that leave no trace.

Python raises an exception between any two bytecodes when a signal has arrived (Ctrl-C, an alarm),
or when another thread asks for it, but never inside a call into C. So every write (`write_to`)
keeps the values of before where they can be found before its first byte is written. The exception
path of the same call puts them back; if that is interrupted too, the next call that writes to this
memory does so, or the next that reads the base (`settle`).

A lock for each block of memory keeps threads apart. Locks are held by a ``with`` statement on the
lock itself, which no interrupt can separate from taking it. A fork waits until no other thread
holds one (`keep_over_fork`), so that a child begins with the base and with locks that are free. On
an accelerator the lock orders the launches, which is enough as long as all use one stream.

Memory that is read-only, or that other processes or a file see, is never written: a parameter in
it gets memory of its own (`make_private`). Mappings that copy on write, as ``from_pretrained``
makes them, are left as they are. Memory can become shared at any time (``share_memory_()``), so
every write checks: for what torch has allocated that takes next to nothing.
"""

from __future__ import annotations

import bisect
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from shira.errors import SwitchError, TargetError

T = TypeVar("T")

# --- where entries are ----------------------------------------------------------------------------


def memory_of(data: Tensor) -> Tensor:
    """Return the entries of a tensor in the order of memory, as a 1-D view.

    It may be written to in any mode of torch's, which lets tensors that were made in inference mode
    be written to there alone.
    """
    if data.is_inference():
        data = alias_of(data)
    if data.is_contiguous():
        return data.view(-1)
    extent = 1 + sum((n - 1) * step for n, step in zip(data.shape, data.stride(), strict=True))
    return data.as_strided((extent,), (1,))


def alias_of(tensor: Tensor) -> Tensor:
    """Return a tensor of the same memory that is no view, and shares nothing else."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def offsets_of(flat: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the places in memory of entries of a weight, given by flat, row-major indices.

    They are ``flat`` itself for a contiguous weight, else int64 ``(k,)``.
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


def index_of(weight: Tensor, offset: int) -> tuple[int, ...]:
    """Return the index of the entry at a place in a weight's memory."""
    index = [0] * weight.dim()
    strides = weight.stride()
    for dim in sorted(range(weight.dim()), key=lambda d: -strides[d]):
        if weight.shape[dim] > 1:
            index[dim], offset = divmod(offset, strides[dim])
    return tuple(index)


def overlaps_itself(weight: Tensor) -> bool:
    """Return whether entries share memory (an expanded tensor): then none may be overwritten."""
    return any(step == 0 and n > 1 for n, step in zip(weight.shape, weight.stride(), strict=True))


# --- writing so that an interrupt leaves no trace -------------------------------------------------


class Write(Protocol):
    """Values for some entries of a memory; the values of before are kept until it is over."""

    def put_in(self) -> None:
        """Keep what is there, and write."""

    def put_back(self) -> None:
        """Undo `put_in`, however much of it was done; may be called more than once."""


def keep_over_fork(*locks: Any) -> None:
    """Take re-entrant locks before a fork, and release them in parent and child.

    Locks of a module that was imported later are taken first.
    """
    taken: dict[int, list[Any]] = {}  # by thread: several may fork at once

    def take() -> None:
        mine = taken[threading.get_ident()] = []
        for lock in locks:
            mine.append(lock)
            lock.acquire()

    def release() -> None:
        mine = taken.get(threading.get_ident(), [])
        while mine:
            try:
                mine[-1].release()
            except RuntimeError:  # released already, or an interrupt came before it was taken
                pass
            mine.pop()

    def release_all() -> None:
        try:
            release()
        except BaseException:
            release()
            raise

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=take, after_in_parent=release_all, after_in_child=release_all)


# A fixed set of locks, chosen by address: nothing to register and nothing to leak. Re-entrant: a
# thread that forks may hold one.
_LOCKS: tuple[Any, ...] = tuple(threading.RLock() for _ in range(61))
keep_over_fork(*_LOCKS)

under_way: dict[int, Write] = {}
"""By the address of the memory: the write that is under way there, or was interrupted for good."""


def lock_of(tensor: Tensor) -> Any:
    """Return the lock that guards a tensor's memory, which views and tied weights share."""
    return _LOCKS[(tensor.untyped_storage().data_ptr() >> 6) % len(_LOCKS)]


def write_to(
    memory: Tensor, write: Write, meanwhile: Callable[[Tensor], T], *, lasting: bool = False
) -> T:
    """Write to a memory, call a function with it, and put back what was there.

    No other thread sees what is written before the function has returned. If the write is
    ``lasting``, it is put back only if the function raises.

    Raises:
        SharedMemoryError: If the memory is read-only or shared with other processes.
        SwitchError: If this thread is in a write to the same memory already: a signal handler or a
            finalizer has called back into the layer that it interrupts.
    """
    storage = memory.untyped_storage()
    foreign = storage.is_shared() or not storage.resizable()  # not torch's allocation, or moved
    if foreign and not MemoryMap().is_private(memory):
        raise SharedMemoryError(memory)
    address = storage.data_ptr()
    lock = _LOCKS[(address >> 6) % len(_LOCKS)]
    if address in under_way:
        _refuse_nested(lock)
    with lock:
        if address in under_way:
            _settle(address)
        try:
            under_way[address] = write
            write.put_in()
            result = meanwhile(memory)
            if not lasting:
                write.put_back()
        except BaseException:
            write.put_back()
            under_way.pop(address, None)
            raise
        del under_way[address]
        return result


def settle(tensor: Tensor | None) -> None:
    """Wait until no write is under way in a tensor's memory; undo one that was interrupted.

    For readers of the base: what they read next is the base, unless another thread begins a write
    meanwhile; refused within a write of this thread, as by `write_to`. Costs next to nothing where
    no write is under way at all.
    """
    if under_way and tensor is not None and not tensor.is_meta:
        address = tensor.untyped_storage().data_ptr()
        if address in under_way:
            lock = lock_of(tensor)
            _refuse_nested(lock)
            with lock:
                _settle(address)


def _settle(address: int) -> None:
    write = under_way.get(address)
    if write is not None:
        write.put_back()
        under_way.pop(address, None)


def _refuse_nested(lock: Any) -> None:
    if lock._is_owned():
        raise SwitchError(
            "this thread is in the middle of a product with this weight, which holds an adapter "
            "meanwhile: a signal handler or a finalizer has used the model that it interrupts. "
            "Let it set a flag, and use the model after the call that was interrupted"
        )


# --- memory that must not be written --------------------------------------------------------------

_CHECKED = "_shira_private_at"
"""On a storage that torch did not allocate: its address when it was last found to be private."""

_FOREIGN = (
    "memory that is read-only or shared with other processes, where an adapter must not be written"
)


class SharedMemoryError(TargetError):
    """Memory that is read-only or shared was to be written to; nothing was."""

    def __init__(self, weight: Tensor) -> None:
        shape = tuple(weight.shape)
        super().__init__(f"a weight of shape {shape} lies in {_FOREIGN}; put a copy in its place")


class MemoryMap:
    """The process's mappings, read once when first needed (Linux); elsewhere torch's own word."""

    def is_private(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory can be written without anyone else seeing it."""
        if tensor.device.type != "cpu" or tensor.is_meta:
            return True
        storage = tensor.untyped_storage()
        if storage.resizable() and not storage.is_shared():
            return True  # torch's own allocator has made it, and nobody has moved it
        # By the storage: an address may be mapped anew, otherwise. Its attributes live as long.
        if getattr(storage, _CHECKED, None) == storage.data_ptr():
            return True
        private = not storage.nbytes() or not storage.is_shared()
        address = tensor.data_ptr()
        at = bisect.bisect_right(self._mappings, address, key=lambda mapping: mapping[0]) - 1
        if storage.nbytes() and at >= 0 and address < self._mappings[at][1]:
            private = self._mappings[at][2]
        if private:
            setattr(storage, _CHECKED, storage.data_ptr())
        return private

    @cached_property
    def _mappings(self) -> list[tuple[int, int, bool]]:
        """Start and end of each, and whether writes to it are private."""
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return []
        mappings = []
        for line in lines:
            span, flags = line.split(maxsplit=2)[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            mappings.append((start, end, "w" in flags and flags.endswith("p")))
        return mappings


def make_private(weight: Tensor, memory_map: MemoryMap | None = None, *, warn: bool = True) -> None:
    """Give a parameter in shared or read-only memory a private copy, of the same identity.

    For many weights the memory map is made once. Another tensor in such memory is the caller's, and
    not moved: a `SharedMemoryError`.
    """
    if (memory_map or MemoryMap()).is_private(weight.data):
        return
    if not isinstance(weight, nn.Parameter):
        raise SharedMemoryError(weight)
    with torch.no_grad():
        weight.data = weight.data.clone()
    if warn:
        warnings.warn(
            f"a weight of shape {tuple(weight.shape)} was in {_FOREIGN}; it has memory of its own "
            "now",
            stacklevel=3,
        )


# --- autograd's count of writes -------------------------------------------------------------------


class WriteCount(NamedTuple):
    """Writes to a weight since it last was the base, as autograd is told of them.

    A graph from before a write, whose backward would multiply with the changed weight, then raises
    torch's own error instead of giving a wrong gradient. Once the weight has the bits of before
    again, and nobody else wrote to it, the count is taken back and that graph may run backward.
    """

    before: int | None
    """Autograd's counter then; None for inference tensors, which have none."""
    writes: int


def count_write(weight: Tensor, earlier: WriteCount | None = None) -> WriteCount:
    """Count one write to a weight, after ``earlier`` ones since it was the base."""
    if weight.is_inference():
        return WriteCount(None, 0)
    if earlier is None or earlier.before is None:
        earlier = WriteCount(weight._version, 0)
    torch.autograd.graph.increment_version(weight)
    return WriteCount(earlier.before, earlier.writes + 1)


def take_back(weight: Tensor, count: WriteCount) -> None:
    """Take counted writes back, once the weight holds the bits of before them again."""
    if count.before is None or weight.is_inference():
        return
    if weight._version == count.before:  # taken back already, or never counted
        return
    if weight._version == count.before + count.writes:
        torch._C._autograd._unsafe_set_version_counter((weight,), (count.before,))
    else:  # somebody else wrote too, or this is another tensor: putting back is a write like others
        torch.autograd.graph.increment_version(weight)
