# SPDX-License-Identifier: Apache-2.0
"""Interrupts at every point at which Python can raise one: `at_every_point`.

A signal's handler runs between bytecodes: after a call, at a function's start, and at a jump back.
Here a trace function raises there, at each such point of a call in turn, so that no timing is
needed and none is left out.
"""

from __future__ import annotations

import dis
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import peft

import shira

_TRACED = tuple(str(Path(module.__file__ or "").parent) for module in (shira, peft))


class Interrupt(BaseException):
    """As KeyboardInterrupt, no Exception."""


@cache
def _checked_after(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions after which Python looks for signals."""
    return frozenset(
        step.offset
        for step in dis.get_instructions(code)
        if step.opname.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE"))
    )


class _Interrupter:
    """Raises at the n-th point."""

    def __init__(self, point: int) -> None:
        self.left = point
        self.raised = False
        self._last: dict[FrameType, int] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_TRACED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._last[frame] = -1
        return self._in_frame

    def _in_frame(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            last = self._last.get(frame)
            self._last[frame] = frame.f_lasti
            if last in _checked_after(frame.f_code):
                self.left -= 1
                if self.left < 0 and not self.raised:
                    self.raised = True
                    raise Interrupt
        elif event == "return":
            self._last.pop(frame, None)
        return self._in_frame


def at_point(function: Callable[[], object], point: int) -> bool:
    """Call a function, interrupted at the n-th point; False if it has no more points."""
    interrupter, before = _Interrupter(point), sys.gettrace()
    try:
        sys.settrace(interrupter)
        function()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return interrupter.raised


def at_every_point(
    function: Callable[[], object], check: Callable[[], object], every: int = 1
) -> int:
    """Call a function again and again, interrupted at another point each time; how many points.

    Args:
        function: Leaves things as it found them, when ``check`` has been called.
        check: Called after each call.
        every: Leave points out: each so many-th is taken.
    """
    point = 0
    while at_point(function, point):
        check()
        point += every
    check()
    return point


def in_child(function: Callable[[], object], seconds: int = 20) -> bool:
    """Return whether a function returns something true in a child, which is killed if it hangs."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(seconds)
            os._exit(0 if function() else 3)
        finally:
            os._exit(4)
    return os.waitpid(child, 0)[1] == 0
