# SPDX-License-Identifier: Apache-2.0
"""The frame of a chart: axes, ticks and grid as SVG, and where in it a value stands."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from shira.cli._report.html import Child, Html, tag

_LARGEST, _SMALLEST = sys.float_info.max, 1e-300
WIDTH, HEIGHT = 400, 230  # units of the drawing, which is scaled to the width there is
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 10, 38


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high``, with a tick at each of ``ticks``."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    show: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """How far along the axis a value is: 0 at ``low``, 1 at ``high``."""
        unit = max(abs(self.low), abs(self.high))  # high - low may be too large for a float
        return (value / unit - self.low / unit) / (self.high / unit - self.low / unit)


def axis(label: str, low: float, high: float, show: Callable[[float], str] = "{:g}".format) -> Axis:
    """An axis that holds both values, with ticks at some four round numbers."""
    if not high > low:
        room = abs(low) * 0.1 or 0.5
        low, high = max(low - room, -_LARGEST), min(high + room, _LARGEST)
    quarter = high / 4 - low / 4
    if quarter < _SMALLEST:  # no round numbers between them
        return Axis(label, low, high, (low, high), "{:.2g}".format)
    step = _round_step(quarter)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
    return Axis(label, low, high, ticks, show)


def x_at(axis: Axis, value: float) -> float:
    """Where a value of the horizontal axis stands."""
    return round(_LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT), 1)


def y_at(axis: Axis, value: float) -> float:
    """Where a value of the vertical axis stands."""
    return round(HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM), 1)


def framed(title: str, x: Axis, y: Axis, drawn: Child) -> Html:
    """A drawing with its axes around it; ``title`` is what is read aloud in its place."""
    left, right, bottom = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    grid = [
        [
            tag("line", class_="grid", x1=left, x2=right, y1=y_at(y, at), y2=y_at(y, at)),
            tag("text", y.show(at), x=left - 5, y=y_at(y, at) + 4, text_anchor="end"),
        ]
        for at in y.ticks
    ]
    below = [
        [
            tag("line", class_="axis", x1=x_at(x, at), x2=x_at(x, at), y1=bottom, y2=bottom + 4),
            tag("text", x.show(at), x=x_at(x, at), y=bottom + 16, text_anchor="middle"),
        ]
        for at in x.ticks
    ]
    labels = [
        tag("text", x.label, x=(left + right) / 2, y=HEIGHT - 5, text_anchor="middle"),
        tag(
            "text",
            y.label,
            transform=f"translate(11 {(_TOP + bottom) / 2}) rotate(-90)",
            text_anchor="middle",
        ),
    ]
    base = tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom)
    size = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", grid, drawn, base, below, labels, viewBox=size, role="img", aria_label=title)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(times for times in (1, 2, 5, 10) if times * power >= step * (1 - 1e-9))
