# SPDX-License-Identifier: Apache-2.0
"""`Study`: a kind of run, where its runs are kept, and how the missing ones are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from studies import runner, store

R = TypeVar("R", bound=store.Configuration)


@dataclass(frozen=True)
class Study(Generic[R]):
    """A study's runs.

    Attributes:
        results: the folder that they are kept in.
        make: the class of a run's configuration.
        protocol: lines of any other in that folder are passed over.
        execute: ``"module:function"``, imported in the process that makes a run: from the run, the
            folder of data and whatever `continue_runs` is given to what came of it.
        said: what is printed of a run that was made, beside its seconds.
        derived: names of properties of a run that are written with it.
        batched: `execute` is given a tuple of runs, and returns a list of what came of each.
    """

    results: Path
    make: Callable[..., R]
    protocol: int
    execute: str
    said: Callable[[R, Mapping[str, Any]], str]
    derived: tuple[str, ...] = ()
    batched: bool = False

    def load(self, folder: Path | None = None) -> dict[str, store.Done[R]]:
        """Every run of this protocol, by key. A last line that was cut off is passed over.

        Raises:
            ValueError: If a line cannot be read, or its key is not that of its configuration.
        """
        return store.load(folder or self.results, self.make, self.protocol)

    def append(
        self,
        run: R,
        result: Mapping[str, Any],
        about: Mapping[str, Any],
        folder: Path | None = None,
    ) -> None:
        """Write a finished run at the end of its stage's file, whole or not at all."""
        derived = {name: getattr(run, name) for name in self.derived}
        store.append(run, result, about, folder or self.results, **derived)

    def continue_runs(
        self,
        missing: Callable[[dict[str, store.Done[R]]], Sequence[R]],
        data: Path,
        *,
        jobs: int,
        minutes: float | None,
        folder: Path | None = None,
        together: int = 1,
        **given: Any,
    ) -> int:
        """Make missing runs in order until none is left or the time is over; how many were made.

        Args:
            missing: those that could be made, given those that were.
            data: the folder of data.
            jobs: processes, each of one thread.
            minutes: begin no run after so long; None for no limit.
            folder: where the runs are written, each as soon as it is made.
            together: runs at a time in a process.
            given: to the function that makes one.
        """

        def record(run: R, result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
            self.append(run, result, about, folder)
            seconds = result["seconds"]
            wall = seconds["wall"] if isinstance(seconds, Mapping) else seconds
            print(f"{self.said(run, result)}, {wall:.0f} s", flush=True)

        return runner.continue_runs(
            lambda: missing(self.load(folder)),
            functools.partial(runner.execute, self.execute, self.batched, given),
            record,
            data,
            jobs=jobs,
            minutes=minutes,
            together=together,
        )
