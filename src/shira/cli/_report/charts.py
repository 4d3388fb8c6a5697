# SPDX-License-Identifier: Apache-2.0
"""The charts of the page: a histogram, points by weight, curves over steps; SVG, no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shira.cli._report.axes import Axis, axis, framed, x_at, y_at
from shira.cli._report.curve import Points
from shira.cli._report.html import Html, tag


def value_histogram(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> Html:
    """How many values there are in each part of their range, on a logarithmic scale.

    Args:
        counts: int64 ``(bins,)``.
        edges: float64 ``(bins + 1,)``.
    """
    most = int(counts.max(initial=1))
    decades = max(1, math.ceil(math.log10(max(most, 1) * 1.05)))
    powers = tuple(map(float, range(0, decades + 1, max(1, -(-decades // 5)))))
    y = Axis("values", -0.3, float(decades), powers, lambda power: f"{10 ** int(power):,}")
    if decades > 4:
        y = Axis("values", -0.3, float(decades), powers, lambda power: f"1e{power:.0f}")
    x = axis("value", float(edges[0]), float(edges[-1]))
    floor = y_at(y, y.low)
    bars = []
    for count, low, high in zip(
        counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
    ):
        if count:
            top = y_at(y, math.log10(count))
            left, right = x_at(x, low), x_at(x, high)
            bars.append(
                tag(
                    "rect",
                    tag("title", f"{low:.3g} to {high:.3g}: {count:,}"),
                    x=left,
                    y=top,
                    width=max(round(right - left, 1), 0.5),
                    height=round(floor - top, 1),
                    class_="s0 bar",
                )
            )
    return framed("Histogram of the values", x, y, bars)


def by_weight(title: str, label: str, names: Sequence[str], **series: Sequence[float]) -> Html:
    """A point for each weight, in the order of the weights, for each of up to two series.

    Args:
        title: Of the chart.
        label: Of the vertical axis.
        names: Of the weights.
        series: Values by weight; the keyword, with spaces for underscores, is its name.
    """
    top = max((value for values in series.values() for value in values), default=0.0)
    x = axis("weight, in the order of the table", 1.0, float(max(len(names), 2)), _whole)
    y = axis(label, 0.0, top or 1.0)
    points = [
        tag(
            "circle",
            tag("title", f"{name}: {label} {value:.4g}"),
            cx=x_at(x, number),
            cy=y_at(y, value),
            r=3,
            class_=f"s{which} point",
        )
        for which, values in enumerate(series.values())
        for number, (name, value) in enumerate(zip(names, values, strict=True), 1)
    ]
    return _with_legend(framed(title, x, y, points), [key.replace("_", " ") for key in series])


def curves(series: Mapping[str, Points]) -> Html:
    """Lines through points of step and loss, with a mark at each if they are few."""
    every = [point for points in series.values() for point in points]
    x = axis("optimizer step", min(p[0] for p in every), max(p[0] for p in every))
    y = axis("loss", min(p[1] for p in every), max(p[1] for p in every))
    drawn = [list(_line(x, y, which, points)) for which, points in enumerate(series.values())]
    return _with_legend(framed("Loss over optimizer steps", x, y, drawn), list(series))


def _line(x: Axis, y: Axis, which: int, points: Points) -> Iterator[Html]:
    path = " ".join(f"{x_at(x, step)},{y_at(y, loss)}" for step, loss in points)
    yield tag("polyline", points=path, class_=f"s{which} line")
    for step, loss in points if len(points) <= 100 else []:
        shown = tag("title", f"step {step:g}: {loss:.4g}")
        yield tag(
            "circle", shown, cx=x_at(x, step), cy=y_at(y, loss), r=3, class_=f"s{which} point"
        )


def _with_legend(chart: Html, names: Sequence[str]) -> Html:
    if len(names) < 2:
        return chart
    entries = (
        tag("span", tag("i", class_=f"s{which} key"), name) for which, name in enumerate(names)
    )
    return tag("div", chart, tag("p", entries, class_="legend"))


def _whole(value: float) -> str:
    return f"{value:g}" if value == int(value) else ""
