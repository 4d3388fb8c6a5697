# SPDX-License-Identifier: Apache-2.0
"""Runs a function on many names in forked processes, which may hang or die without harm."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("fork")
PER_WORKER = 60
MEMORY = 12 * 2**30


def each(
    work: Callable[[str], Any], names: Sequence[str], seconds: float, jobs: int = 1
) -> Iterator[tuple[str, Any]]:
    """Yield each name and what came of it, or a string that says how its process ended.

    Args:
        work: Called in the other process.
        names: One call for each.
        seconds: After which a call is ended; the rest goes on in a new process.
        jobs: How many processes at a time.
    """
    pending = [list(names[at : at + PER_WORKER]) for at in range(0, len(names), PER_WORKER)]
    running: list[_Worker] = []
    while pending or running:
        while pending and len(running) < jobs:
            running.append(_Worker(work, pending.pop(0), seconds))
        soonest = min(worker.deadline for worker in running)
        wait([worker.pipe for worker in running], max(0.0, soonest - time.monotonic()))
        for worker in list(running):
            answer = worker.answer()
            if answer is None:
                continue
            name, result = answer
            if isinstance(result, str) or not worker.names:
                worker.end()
                running.remove(worker)
                if worker.names:
                    pending.insert(0, worker.names)
            yield name, result


class _Worker:
    """A process, the names that it has not answered, and when it must answer the next."""

    def __init__(self, work: Callable[[str], Any], names: list[str], seconds: float) -> None:
        self.names, self.seconds = names, seconds
        self.pipe, there = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_serve, args=(work, names, there), daemon=True)
        self.process.start()
        there.close()
        self.deadline = time.monotonic() + seconds

    def answer(self) -> tuple[str, Any] | None:
        """Return the next name and what came of it; None if it is not there yet."""
        result: Any = f"more than {self.seconds:.0f} s"
        if self.pipe.poll():
            try:
                result = self.pipe.recv()
            except EOFError:
                self.process.join()
                result = f"its process ended with {self.process.exitcode}"
        elif time.monotonic() < self.deadline:
            return None
        self.deadline = time.monotonic() + self.seconds
        return self.names.pop(0), result

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(work: Callable[[str], Any], names: Sequence[str], pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in names:
        pipe.send(work(name))
