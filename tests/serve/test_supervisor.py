# SPDX-License-Identifier: Apache-2.0
"""When a server is started again, when not, and that nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from shira.errors import ConfigError
from shira.serve.supervisor import Restarts, Supervisor
from tests.serve import fake_server

QUICK = {"first": 0.01, "longest": 0.02}


class Scene:
    """A supervisor of a fake server; `after` is what to do when it has said something."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, []
        self.after = {}

    def say(self, line: str) -> None:
        self.said.append(line)
        for text in [text for text in self.after if text in line]:
            self.after.pop(text)()

    def run(self, *plan: str, grace: float = 20.0, restarts: Restarts | None = None) -> int:
        ready = self.folder / "ready"
        self.supervisor = Supervisor(
            [sys.executable, fake_server.__file__, str(self.folder), ",".join(plan)],
            env={**os.environ, "SHIRA_READY": str(ready)},
            ready=ready,
            restarts=restarts or Restarts(3, **QUICK),
            grace=grace,
            say=self.say,
        )
        hung = threading.Timer(60, self._give_up)
        hung.start()
        status = self.supervisor.run()
        hung.cancel()
        assert "hung" not in self.said, self.said
        return status

    def _give_up(self) -> None:
        self.said.append("hung")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    def lives(self) -> list[list[int]]:
        files = sorted(self.folder.glob("life-*"))
        return [[int(pid) for pid in file.read_text().split()] for file in files]

    def left(self) -> list[int]:
        return [pid for life in self.lives() for pid in life if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ask(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    # Under nohup the one is ignored, in what a shell's script has started with & the other.
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield scene
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGHUP, hang_up)
    signal.signal(signal.SIGINT, interrupt)
    assert after == before
    for pid in scene.left():  # of a test that failed
        os.kill(pid, signal.SIGKILL)


def test_a_server_that_died_is_started_again_and_ends_when_asked_to(scene):
    scene.after["(2 of 3)"] = lambda: scene.after.update({"is ready": ask(signal.SIGTERM)})
    assert scene.run("die", "die", "serve") == 0
    assert len(scene.lives()) == 3
    assert scene.left() == []
    again = [line for line in scene.said if "again" in line]
    assert len(again) == 2
    assert "was killed by SIGKILL" in again[0]
    assert "(1 of 3)" in again[0]
    assert "(2 of 3)" in again[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_end_it_too(scene, number):
    scene.after["is ready"] = ask(number)
    assert scene.run("serve") == 0
    assert scene.left() == []


def test_a_signal_that_was_ignored_stays_so(scene):
    def hang_up():
        os.kill(os.getpid(), signal.SIGHUP)
        scene.after["(1 of 3)"] = ask(signal.SIGTERM)
        for server, _ in scene.lives():
            os.kill(server, signal.SIGKILL)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        scene.after["is ready"] = hang_up
        assert scene.run("serve") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert any("starting it again" in line for line in scene.said)


def test_a_server_that_was_never_ready_is_not_started_again(scene):
    assert scene.run("fail", "serve") == 3
    assert len(scene.lives()) == 1
    assert scene.left() == []
    assert "ended with status 3 before it was ready" in scene.said[-1]


def test_once_it_was_ready_a_failed_start_counts_as_a_death(scene):
    scene.after["(2 of 3)"] = lambda: scene.after.update({"is ready": ask(signal.SIGTERM)})
    assert scene.run("die", "fail", "serve") == 0
    assert len(scene.lives()) == 3


def test_too_many_deaths_are_the_end(scene):
    assert scene.run("die") == 1
    assert len(scene.lives()) == 1 + 3
    assert scene.left() == []
    assert "giving up" in scene.said[-1]


def test_a_server_that_does_not_end_is_killed(scene):
    scene.after["is ready"] = ask(signal.SIGTERM)
    assert scene.run("deaf", grace=0.2) == 0
    assert scene.left() == []


def test_a_second_signal_does_not_wait(scene):
    scene.after["is ready"] = ask(signal.SIGINT)
    scene.after["ending the server"] = ask(signal.SIGINT)
    assert scene.run("deaf", grace=3600.0) == 0
    assert scene.left() == []


def test_asked_to_end_while_it_waits(scene):
    scene.after["starting it again"] = ask(signal.SIGTERM)
    assert scene.run("die", restarts=Restarts(3, first=3600, longest=3600)) == 0
    assert len(scene.lives()) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells children")
def test_a_killed_supervisor_leaves_no_server(tmp_path):
    program = (
        "import sys; from pathlib import Path; from shira.serve.supervisor import Supervisor\n"
        "import os; folder = Path(sys.argv[1]); ready = folder / 'ready'\n"
        f"command = [sys.executable, {fake_server.__file__!r}, str(folder), 'serve']\n"
        "env = {**os.environ, 'SHIRA_READY': str(ready)}\n"
        "Supervisor(command, env=env, ready=ready).run()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    scene = Scene(tmp_path)
    try:
        wait_for(lambda: (tmp_path / "ready").exists())
        supervisor.kill()
        supervisor.wait()
        (server, worker), *_ = scene.lives()
        wait_for(lambda: not alive(server))
        os.kill(worker, signal.SIGKILL)  # vLLM's workers end with their server
    finally:
        supervisor.kill()
        for pid in scene.left():
            os.kill(pid, signal.SIGKILL)


def wait_for(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_pauses_grow_and_old_restarts_are_forgotten():
    restarts = Restarts(4, 100.0, first=1.0, longest=5.0)
    assert [restarts.wait_after(now) for now in (0, 10, 20, 30)] == [1.0, 2.0, 4.0, 5.0]
    assert restarts.wait_after(99.0) is None
    assert restarts.wait_after(100.0) == 5.0  # that of 0 no longer counts
    assert restarts.wait_after(500.0) == 1.0
    assert Restarts(0).wait_after(0.0) is None


def test_restarts_that_cannot_be_meant():
    for wrong in ({"limit": -1}, {"window": -1.0}, {"first": float("nan")}):
        with pytest.raises(ConfigError):
            Restarts(**wrong)
