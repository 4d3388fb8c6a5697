# SPDX-License-Identifier: Apache-2.0
"""`Riders`: the requests in flight that bring adapters along, and those that wait for room.

What a request rides on is counted from before it is given to the engine until it has ended there,
and what is counted is never dropped from memory (`shira.serve.holding`). With a bound not all
adapters are in memory together, so that a request may have to wait until others have ended::

    in line --it is the first, and there is room--> on board --it has ended--> gone

So who needs an adapter is never overtaken by one who came later and needs one, too. Knows names
alone: `shira.serve.changes` knows the bytes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager


class Riders:
    """Those of one engine."""

    def __init__(self) -> None:
        self.on_board: Counter[str] = Counter()
        """Numbers of requests in flight, by the adapter that they ride on."""
        self.in_line: Counter[str] = Counter()
        """Numbers of those that wait, likewise."""
        self._first = asyncio.Lock()  # it is given in the order in which it was asked for
        self._changed = asyncio.Event()

    @contextmanager
    def aboard(self, names: Collection[str]) -> Iterator[None]:
        """Count a request that rides on these adapters."""
        each = Counter(list(names))  # not what a mapping says
        self.on_board += each
        try:
            yield
        finally:
            self.on_board -= each
            self.look_again()

    @asynccontextmanager
    async def first(self, names: Collection[str]) -> AsyncIterator[None]:
        """Be the first in line inside the context, once all who came before have left it."""
        each = Counter(list(names))
        self.in_line += each
        try:
            async with self._first:
                yield
        finally:
            self.in_line -= each

    async def change(self) -> None:
        """Wait, as the first in line, until a request has ended."""
        self._changed.clear()
        await self._changed.wait()

    def look_again(self) -> None:
        """Let the first in line see whether there is room now."""
        self._changed.set()
