# SPDX-License-Identifier: Apache-2.0
"""A weight's memory, and writing to it so that an interrupt leaves no trace: `write_to`.

Python raises an exception between any two bytecodes when a signal has arrived (Ctrl-C, an alarm),
or when another thread asks for it, but never inside a call into C. So every write keeps the values
of before where they can be found before its first byte is written. The exception path of the same
call puts them back; if that is interrupted too, the next call that writes to this memory does so,
or the next that reads the base (`settle`).

A lock for each block of memory keeps threads apart. Locks are held by a ``with`` statement on the
lock itself, which no interrupt can separate from taking it. A fork waits until no other thread
holds one (`keep_over_fork`), so that a child begins with the base and with locks that are free. On
an accelerator the lock orders the launches, which is enough as long as all use one stream.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from shira.errors import SwitchError
from shira.ops.private_memory import check_private

T = TypeVar("T")


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


def address_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, which views and tied weights share."""
    return tensor.untyped_storage().data_ptr()


def lock_of(tensor: Tensor) -> Any:
    """Return the lock that guards a tensor's memory."""
    return _lock_at(address_of(tensor))


def _lock_at(address: int) -> Any:
    return _LOCKS[(address >> 6) % len(_LOCKS)]


def write_to(
    memory: Tensor, write: Write, meanwhile: Callable[[Tensor], T], *, lasting: bool = False
) -> T:
    """Write to a memory, call a function, and put back what was there.

    Args:
        memory: What is written to.
        write: What to write. Made, with room for the values of before, in advance.
        meanwhile: Called with ``memory`` when all is written, before another thread can see it.
        lasting: Leave the written values there, unless ``meanwhile`` raises.

    Returns:
        What ``meanwhile`` returns.

    Raises:
        SharedMemoryError: If the memory is read-only or shared with other processes.
        SwitchError: If this thread is in a write to the same memory already: a signal handler or a
            finalizer has called back into the layer that it interrupts.
    """
    storage = memory.untyped_storage()
    if storage.is_shared() or not storage.resizable():  # torch has not allocated it, or moved it
        check_private(memory)
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
    meanwhile. Costs next to nothing where no write is under way at all.

    Raises:
        SwitchError: If this thread itself is in a write, as `write_to`.
    """
    if under_way and tensor is not None and not tensor.is_meta:
        address = address_of(tensor)
        if address in under_way:
            lock = _lock_at(address)
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


def memory_of(data: Tensor) -> Tensor:
    """Return the entries of a tensor in the order of memory, as a 1-D view."""
    if data.is_contiguous():
        return data.view(-1)
    extent = 1 + sum((n - 1) * step for n, step in zip(data.shape, data.stride(), strict=True))
    return data.as_strided((extent,), (1,))
