# SPDX-License-Identifier: Apache-2.0
"""Progress where no person looks: a few plain lines, none for what is quick."""

from __future__ import annotations

import pytest

from shira.cli import progress
from shira.cli.progress import Steps, say, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_what_is_quick_says_nothing(clock, capsys):
    assert list(track(range(100), "counting")) == list(range(100))
    assert capsys.readouterr() == ("", "")


def test_four_plain_lines(clock, capsys):
    with Steps("training", 200) as steps:
        for done in range(1, 201):
            clock.now = 2.0 * done
            steps.update(done, "loss 1.500")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training: 50/200, 100 s, loss 1.500",
        "training: 100/200, 200 s, loss 1.500",
        "training: 150/200, 300 s, loss 1.500",
        "training: 200/200, 400 s, loss 1.500",
    ]


def test_fewer_steps_than_lines_and_none_at_all(clock, capsys):
    with Steps("short", 2) as steps:
        clock.now = 5.0
        steps.update(1)
        steps.update(2)
    with Steps("empty", 0):
        pass
    assert capsys.readouterr().err.splitlines() == ["short: 1/2, 5 s", "short: 2/2, 5 s"]


def test_of_several_processes_the_first_says_it(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say(f"process {rank}")
    assert capsys.readouterr().err == "process 0\n"
