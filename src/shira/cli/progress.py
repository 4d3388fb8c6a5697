# SPDX-License-Identifier: Apache-2.0
"""Progress of what takes longer than a second: a bar on a terminal, a few plain lines elsewhere.

It goes to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from shira.cli.output import console, write
from shira.errors import shown

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_LINES = 4  # so many are printed where there is no bar, and none in the first second


class Steps:
    """Progress over a number of steps, which `tell` may say, in such units; a context manager."""

    def __init__(self, what: str, total: int = 0, unit: int = 1) -> None:
        self.what = shown(what)
        self.total = max(total, 1)
        self._unit = unit
        self._bar: Progress | None = None

    def __enter__(self) -> Steps:
        self._started, self._done = time.perf_counter(), 0
        if sys.stderr.isatty():
            from rich import progress as bars

            self._bar = bars.Progress(
                bars.TextColumn("{task.description}", markup=False),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[note]}", markup=False),
                console=console(sys.stderr),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are done, with `note` beside the count."""
        before, self._done = self._done, done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, note=shown(note))
            return
        elapsed = time.perf_counter() - self._started
        if elapsed >= 1 and before * _LINES // self.total != done * _LINES // self.total:
            text = f"{self.what}: {done}/{self.total}, {elapsed:.0f} s"
            write(f"{text}, {note}" if note else text, sys.stderr)

    def tell(self, done: int, total: int) -> None:
        """Show that so many are done of so many: what functions of shira call as ``progress``."""
        self.total = max(total // self._unit, 1)
        self.update(done // self._unit)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items one by one, and show how far it is."""
    with Steps(what, len(items)) as steps:
        for done, item in enumerate(items):
            yield item
            steps.update(done + 1)


def say(message: str) -> None:
    """Print on standard error what happens next; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        write(message, sys.stderr)
