# SPDX-License-Identifier: Apache-2.0
"""`AdapterScheduler`: requests wait for their adapter's turn, grouped, and none waits for ever.

Adapters that live inside the weights serve one at a time. A request for the adapter that is active
goes ahead; one for another waits until the running requests have ended and the weights have been
switched. Nothing here knows of an engine: pure asyncio, one event loop, no threads.

The rules::

    - who wants the active adapter goes ahead at once, as long as nobody else has waited `patience`
      seconds; after that he queues as well, so that the running requests come to an end
    - when none is running, the adapter of the longest waiting request is switched to, and all who
      wait for it go ahead together, in the order in which they came
    - an idle adapter gives way at once

So with A adapters (the base counts as one), requests that take at most D seconds once let in and
switches that take at most s, nobody waits longer than ``patience + A * (D + s)``: the door closes
after `patience`, who is inside comes out within D, and each of the other adapters gets at most one
turn of those who came earlier, for its newcomers queue behind whoever waits longer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

from shira.errors import ConfigError

Activate = Callable[[Any], Awaitable[Any]]
"""Switches the engine to an adapter; returns once the next request is answered by it alone."""


class _Waiter(NamedTuple):
    since: float  # event loop time of arrival
    let_in: asyncio.Future[None]


class _Alone:
    """The key of one who wants the engine for himself; each is its own."""


class AdapterScheduler:
    """Gate that lets requests through, one adapter at a time.

    Args:
        activate: Called with the adapter of the next turn when no request is running. If it
            raises, the requests that wait for that adapter get the exception, and the adapter
            before it is taken to be active still.
        active: The adapter that is active now; any hashable, by custom None for the base.
        patience: Seconds that a request for another adapter may wait before newcomers for the
            active one have to queue behind it. 0: in turn; larger: longer groups, fewer switches.

    Raises:
        ConfigError: If ``patience`` is negative or not finite.
    """

    def __init__(
        self, activate: Activate, *, active: Hashable = None, patience: float = 0.5
    ) -> None:
        if not 0 <= patience < math.inf:
            raise ConfigError(f"patience is a number of seconds, 0 or more, not {patience!r}")
        self.patience = patience
        self.switches = 0
        """The number of switches so far."""
        self._activate = activate
        self.active = active
        """The adapter whose turn it is."""
        self.running = 0
        """Requests that were let in and have not ended."""
        self._alone = False
        self._queues: dict[Hashable, list[_Waiter]] = {}
        self._switching: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> dict[Hashable, int]:
        """Number of requests that wait for each adapter."""
        return {key: len(q) for key, q in self._queues.items() if not isinstance(key, _Alone)}

    @asynccontextmanager
    async def using(
        self, adapter: Hashable, *, unless: asyncio.Future[Any] | None = None
    ) -> AsyncIterator[bool]:
        """Have an adapter active inside the context; false if its turn was given up.

        Args:
            adapter: The adapter.
            unless: The turn is given up if this is done before it comes.

        Raises:
            Exception: What ``activate`` raised, if the adapter could not be switched to.
        """
        waiter = _Waiter(_now(), asyncio.get_running_loop().create_future())
        self._queues.setdefault(adapter, []).append(waiter)
        self._proceed()
        try:
            if not waiter.let_in.done():
                first = [waiter.let_in] if unless is None else [waiter.let_in, unless]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if unless is not None and unless.done():
                yield False
            else:
                waiter.let_in.result()
                yield True
        finally:
            if not waiter.let_in.done():
                self._queues[adapter].remove(waiter)
            elif waiter.let_in.exception() is None:
                self._alone = False
                self.running -= 1
            self._proceed()

    def alone(self) -> AbstractAsyncContextManager[bool]:
        """Have no request running inside the context, and none let in; its turn comes as others'.

        For what changes the weights otherwise. See `assume` for when it changed what is active.
        """
        return self.using(_Alone())

    def assume(self, active: Hashable) -> None:
        """Say which adapter is active now; for use inside `alone`."""
        assert self._alone, "assume() without alone()"
        self.active = active

    def fail(self, adapter: Hashable, error: Exception) -> int:
        """Let all who wait for an adapter end with an error, as when it is unloaded; how many."""
        queue = self._queues.pop(adapter, None) or ()
        for waiter in queue:
            waiter.let_in.set_exception(error)
        self._proceed()
        return len(queue)

    def _proceed(self) -> None:
        """Let in who may; start a switch if it is time, or set the alarm for when it will be."""
        self._queues = {key: queue for key, queue in self._queues.items() if queue}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._switching is not None or self._alone:
            return
        others = [key for key in self._queues if key != self.active]
        if not others:
            self._let_in(self.active)
            return
        other = min(others, key=lambda key: self._queues[key][0].since)  # waits longest
        closes = self._queues[other][0].since + (0 if isinstance(other, _Alone) else self.patience)
        if _now() < closes:
            self._let_in(self.active)
            self._timer = asyncio.get_running_loop().call_at(closes, self._proceed)
        if self.running:
            return
        if isinstance(other, _Alone):
            self._alone = True
            self._let_in(other)
        else:
            self._switching = asyncio.get_running_loop().create_task(self._switch(other))

    async def _switch(self, adapter: Hashable) -> None:
        try:
            await self._activate(adapter)
        except Exception as error:
            self._switching = None
            self.fail(adapter, error)
            return
        except BaseException:
            self._switching = None
            self.fail(adapter, RuntimeError(f"switching to {adapter!r} was cancelled"))
            raise
        self._switching = None
        self.active = adapter
        self.switches += 1
        self._let_in(adapter)
        self._proceed()

    def _let_in(self, adapter: Hashable) -> None:
        for waiter in self._queues.pop(adapter, ()):
            waiter.let_in.set_result(None)
            self.running += 1


def _now() -> float:
    return asyncio.get_running_loop().time()
