# SPDX-License-Identifier: Apache-2.0
"""Progress of work that tells how much is done and how much there is in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from shira.cli.progress import Steps

_MILLION = 10**6


@contextmanager
def following(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to give as ``progress`` to `shira.convert`; it counts in millions.

    Args:
        what: What is being done and counted, e.g. ``"copying, MB"``.
    """
    with ExitStack() as stack:
        steps: Steps | None = None

        def tell(done: int, total: int) -> None:
            nonlocal steps
            if steps is None:
                steps = stack.enter_context(Steps(what, total // _MILLION))
            steps.update(done // _MILLION)

        yield tell
