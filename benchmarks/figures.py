# SPDX-License-Identifier: Apache-2.0
"""Panels as one SVG picture: bars with their quartiles, lines over an axis. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.panels import Panel

OURS, OTHERS = "#00796b", "#9e9e9e"
STYLE = {
    "font.size": 9,
    "svg.hashsalt": "shira",  # the same picture has the same bytes
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(panels: Sequence[Panel]) -> bytes:
    """One SVG, the panels below each other, on white."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = _figure(panels)
        FigureCanvasSVG(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _figure(panels: Sequence[Panel]) -> Figure:
    heights = [0.9 + 0.27 * len(panel.bars) if panel.bars else 3.0 for panel in panels]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        (_bars if panel.bars else _lines)(axes, panel)
        axes.set_title(panel.title, loc="left", fontsize=10)
    return figure


def _bars(axes: Any, panel: Panel) -> None:
    assert panel.bars is not None
    places = range(len(panel.bars))
    bars = list(panel.bars.values())
    values = [bar.value for bar in bars]
    # A minimum that is taken on its own may lie outside the quartiles; a spread is never negative.
    spread = [
        [max(0.0, bar.value - bar.low) for bar in bars],
        [max(0.0, bar.high - bar.value) for bar in bars],
    ]
    ours = [name.startswith("shira") for name in panel.bars]
    colours = [OURS if mine or not any(ours) else OTHERS for mine in ours]
    axes.barh(places, values, xerr=spread, color=colours, height=0.7, error_kw={"capsize": 2})
    axes.set_yticks(places, list(panel.bars))
    axes.invert_yaxis()
    axes.set_xlabel(panel.unit)
    if panel.log:
        axes.set_xscale("log")
    for place, bar in zip(places, bars, strict=True):
        axes.annotate(
            f"{bar.value:.3g}" if bar.value < 1000 else f"{bar.value:,.0f}",
            (max(bar.value, bar.high), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.margins(x=0.12)


def _lines(axes: Any, panel: Panel) -> None:
    assert panel.lines is not None
    for name, points in panel.lines.items():
        low = [bar.low for bar in points]
        high = [bar.high for bar in points]
        (line,) = axes.plot(panel.axis, [bar.value for bar in points], marker="o", label=name)
        axes.fill_between(panel.axis, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel(panel.axis_name)
    axes.set_ylabel(panel.unit)
    axes.set_xscale("log")
    axes.set_xticks(panel.axis, [f"{point:g}" for point in panel.axis])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
