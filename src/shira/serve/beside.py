# SPDX-License-Identifier: Apache-2.0
"""`Beside`: a load that goes on while the engine computes; what it needs of the model in slices.

::

    begin    a thread reads the file, checks it, and splits it as the checkpoint has it
    step     between two steps of the engine: asks the model's loader where tensors lie, for a few
             milliseconds at a time; once it knows, a thread places, compares and hashes
    result   what the threads found, for the hand-over between two steps

The model's loader is asked between steps alone, for it may touch the modules. In every process of a
model the same happens; the second thread talks with the other processes by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Read = TypeVar("Read")
Key = TypeVar("Key")

SLICE = 0.005  # seconds between two of the engine's steps


class Beside(Generic[Read, Key, T]):
    """One load, begun.

    Args:
        read: Runs in a thread.
        keys: The tensors of what was read, runs in the thread after it.
        find: Called with each of them, between steps.
        place: Runs in a thread at last, with a call that returns what was read, or raises what
            came in the way. It alone may talk with other processes, and is called in all of them.
    """

    def __init__(
        self,
        read: Callable[[], Read],
        keys: Callable[[Read], Iterable[Key]],
        find: Callable[[Key], object],
        place: Callable[[Callable[[], Read]], T],
    ) -> None:
        def prepared() -> tuple[Read, list[Key]]:
            value = read()
            return value, list(dict.fromkeys(keys(value)))

        self._find, self._place = find, place
        self._read: Future[tuple[Read, list[Key]]] = _in_a_thread(prepared)
        self._left: list[Key] | None = None
        self._placed: Future[T] | None = None

    def step(self, seconds: float = SLICE) -> bool:
        """Do, between two steps of the engine, what is due; return whether the result is there."""
        if self._placed is None:
            if not self._read.done():
                return False
            found = self._found(time.perf_counter() + seconds)
            if found is None:
                return False
            self._placed = _in_a_thread(lambda: self._place(found))
        return self._placed.done()

    def result(self) -> T:
        """Wait for the end, and return what ``place`` did; raises what it raised."""
        wait([self._read])
        while not self.step(float("inf")):
            assert self._placed is not None
            wait([self._placed])
        assert self._placed is not None
        return self._placed.result()

    def _found(self, until: float) -> Callable[[], Read] | None:
        """Find what is left until then; return the call for ``place``, None if there is more."""
        try:
            value, keys = self._read.result()
            if self._left is None:
                self._left = keys
            while self._left:
                if time.perf_counter() > until:
                    return None
                self._find(self._left[-1])
                self._left.pop()
        except Exception as error:
            failed = error

            def fail() -> Read:
                raise failed

            return fail
        return lambda: value


def _in_a_thread(call: Callable[[], T]) -> Future[T]:
    """Start a call in a thread that nobody waits for when the process ends."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            with torch.no_grad():
                done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="shira-load", daemon=True).start()
    return done
