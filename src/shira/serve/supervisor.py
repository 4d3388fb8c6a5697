# SPDX-License-Identifier: Apache-2.0
"""Keep a server going: start it as a child, start it again when it died, end it in order.

vLLM ends its server when a worker dies. `Supervisor` waits a little, longer each time, and starts
the server anew; the journal (`shira.serve.http.service`) gives it its adapters back before it takes
requests. A server that was never ready is not started again: its command is wrong, not its luck.
The child leads a process group of its own, and what is left of the group when the child has ended
is ended too, so that no worker keeps a device. Imports neither torch nor an engine.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from shira.errors import ConfigError

_LOOK = 0.1  # seconds between two looks at the child
_GRACE = 5.0  # seconds that what is left of a server has to end in order
_SIGNALS = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


class Restarts:
    """The rule of restarts: how long to wait before one, and when to give up.

    Args:
        limit: Restarts within the window; 0: none.
        window: Seconds.
        first: Seconds before the first restart; each further one in the window waits twice as long.
        longest: Seconds that are waited at most.

    Raises:
        ConfigError: If one of them is negative.
    """

    def __init__(
        self,
        limit: int = 5,
        window: float = 3600.0,
        *,
        first: float = 1.0,
        longest: float = 60.0,
    ) -> None:
        if not all(each >= 0 for each in (limit, window, first, longest)):
            raise ConfigError("restarts: the limit and all seconds are 0 or more")
        self.limit, self.window, self.first, self.longest = limit, window, first, longest
        self._past: list[float] = []

    @property
    def count(self) -> int:
        """Restarts that were granted and still count."""
        return len(self._past)

    def wait_after(self, died: float) -> float | None:
        """Return seconds to wait after a death, which then counts; None: it was one too many.

        Args:
            died: When, on any clock that does not go back.
        """
        self._past = [past for past in self._past if died - past < self.window]
        if len(self._past) >= self.limit:
            return None
        wait = min(self.first * 2.0 ** min(len(self._past), 64), self.longest)
        self._past.append(died)
        return wait


class Supervisor:
    """One server, for as long as it is wanted.

    Args:
        command: What starts it. It leads a process group of its own.
        env: Its environment.
        ready: The file that it makes when it is about to take requests.
        restarts: When to start it again.
        grace: Seconds it has to end in order; then it is killed.
        say: Told what happens, a line at a time.

    Raises:
        ConfigError: If the grace is negative or NaN.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        ready: Path,
        restarts: Restarts | None = None,
        grace: float = 30.0,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        if not grace >= 0:
            raise ConfigError(f"the grace is a number of seconds, 0 or more, not {grace!r}")
        self.command, self.env, self.ready = list(command), dict(env), ready
        self.restarts = restarts or Restarts()
        self.grace = grace
        self.say = say
        self._asked = 0
        self._was_ready = False

    def run(self) -> int:
        """Keep the server going until SIGTERM, SIGINT or SIGHUP, or until it dies too often.

        A second signal kills the server rather than wait for it. To be called in the main thread.

        Returns:
            An exit status: 0 after a signal; the server's own if it ended before it was ever ready;
            1 if it died too often.
        """
        with self._listening(), _adopting():
            while not self._asked:
                self.ready.unlink(missing_ok=True)
                began = time.monotonic()
                status = self._one_life()
                if self._asked:
                    self.say("the server has ended")
                    return 0
                if not self._was_ready:
                    self.say(f"the server {_how(status)} before it was ready; see its output")
                    return status if status > 0 else int(status != 0)
                told = f"the server {_how(status)} after {time.monotonic() - began:.0f} s"
                rule = self.restarts
                wait = rule.wait_after(time.monotonic())
                if wait is None:
                    again = f"was started again {rule.count} times in {rule.window:g} s"
                    self.say(f"{told} and {again}; giving up")
                    return 1
                count = f"{rule.count} of {rule.limit}"
                self.say(f"{told}; starting it again in {wait:g} s ({count})")
                end = time.monotonic() + wait
                while not self._asked and time.monotonic() < end:
                    time.sleep(min(_LOOK, wait))
            return 0

    def _one_life(self) -> int:
        """Start the server and wait for its end; return its status."""
        began, ready = time.monotonic(), False
        process = subprocess.Popen(
            self.command,
            env=self.env,
            start_new_session=True,
            preexec_fn=partial(_end_with, os.getpid()),
        )
        kill_at: float | None = None
        try:
            while process.poll() is None:
                if not ready and self.ready.exists():
                    ready = self._was_ready = True
                    self.say(f"the server is ready after {time.monotonic() - began:.0f} s")
                if self._asked and kill_at is None:
                    self.say(f"ending the server, within {self.grace:g} s")
                    process.terminate()
                    kill_at = time.monotonic() + self.grace
                if kill_at is not None and (self._asked > 1 or time.monotonic() > kill_at):
                    _send(process.pid, signal.SIGKILL)
                time.sleep(_LOOK)
        finally:
            if process.poll() is None:  # we are being ended by an exception
                process.kill()
                process.wait()
            _end_group(process.pid)
        self._was_ready |= self.ready.exists()
        return process.returncode

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def asked(number: int, frame: object) -> None:
            self._asked += 1

        numbers = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup's stays
        before = {number: signal.signal(number, asked) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_group(group: int) -> None:
    """End what is left of a process group whose leader has ended."""
    end = time.monotonic() + _GRACE
    number = signal.SIGTERM
    # What is killed and still listed a second later, nobody has buried.
    while _send(group, number) and time.monotonic() <= end + 1:
        with suppress(ChildProcessError):  # orphans are ours, see `_adopting`: bury them
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        if time.monotonic() > end:
            number = signal.SIGKILL
        time.sleep(_LOOK / 2)


def _send(group: int, number: int) -> bool:
    """Send a signal to a process group; whether there is anyone in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


@contextmanager
def _adopting() -> Iterator[None]:
    """Have orphans below this process become its children (Linux), so that it can bury them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _end_with(parent: int) -> None:
    """Let this child end in order when its parent was killed, where the system can (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)


def _how(status: int) -> str:
    if status < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
