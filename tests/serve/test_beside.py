# SPDX-License-Identifier: Apache-2.0
"""A load beside the engine's steps: what runs where, and that no step waits long for it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from shira.serve.beside import SLICE, Beside


def test_threads_read_and_place_and_the_model_is_asked_between_steps_in_slices():
    main, where, release = threading.current_thread(), {}, threading.Event()

    def noted(what, value=None):
        where.setdefault(what, set()).add(threading.current_thread() is main)
        return value

    def read():
        release.wait(10)
        assert not torch.is_grad_enabled()
        return noted("read", list(range(50)))

    def find(key):
        noted("find")
        found.append(key)
        time.sleep(SLICE / 5)

    found, longest = [], 0.0
    load = Beside(read, lambda value: [*value, 0, 1], find, lambda get: noted("place", sum(get())))
    assert not load.step()
    release.set()
    done = False
    while not done:
        began = time.perf_counter()
        done = load.step()
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.001)
    assert load.result() == sum(range(50))
    assert sorted(found) == list(range(50))
    assert where == {"read": {False}, "find": {True}, "place": {False}}
    assert longest < 10 * SLICE  # and not 50 times a fifth of it


@pytest.mark.parametrize("what", ["read", "keys", "find", "place"])
def test_whatever_fails_fails_in_place_which_all_processes_come_to(what):
    placed = []

    def fail(name):
        if name == what:
            raise ZeroDivisionError(name)

    def place(get):
        placed.append(1)
        get()
        fail("place")

    load = Beside(
        lambda: fail("read"),
        lambda value: fail("keys") or [1],
        lambda key: fail("find"),
        place,
    )
    with pytest.raises(ZeroDivisionError, match=what):
        load.result()
    assert placed == [1]
