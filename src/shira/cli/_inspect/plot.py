# SPDX-License-Identifier: Apache-2.0
"""The picture of one adapter: heat maps of its masks and a histogram of its values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shira.adapter import Adapter
from shira.cli._inspect.pictures import heat_map, histogram
from shira.cli._inspect.summary import Summary, known_shapes
from shira.cli._inspect.tables import without_number
from shira.cli.pictures import new_drawing, write_drawing
from shira.errors import shown

_MOST = 24  # heat maps in one picture
_ACROSS = 4

Map = NDArray[np.float64]


def plot_adapter(summary: Summary, path: Path, *, each: bool = False) -> None:
    """Draw an adapter as a PNG.

    Weights of like name and shape in different layers share a heat map, the mean of theirs, unless
    ``each``; of more than 24 maps the first are drawn and the title says of how many.

    Args:
        summary: Of the adapter, whose file is read again for its entries.
        path: Where to write it.
        each: A heat map for each weight.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        ConfigError: If the folder of ``path`` does not exist, or the shapes are not known.
    """
    adapter = Adapter.load(summary.path, base=known_shapes(summary, "--plot"))
    maps = mean_maps(adapter, each=each)
    drawn = list(maps.items())[:_MOST]
    across = min(_ACROSS, max(1, len(drawn)))
    down = -(-len(drawn) // across)
    drawing = new_drawing((3.4 * across + 1.0, 3.0 * down + 2.6), "--plot", path)
    parts: Any = drawing.subfigures(2, 1, height_ratios=[3.0 * max(1, down), 2.6])
    top, bottom = parts
    _draw_maps(top, drawn, len(maps), (max(1, down), across))
    _draw_histogram(bottom, adapter, summary)
    write_drawing(drawing, path, dpi=110)


def mean_maps(adapter: Adapter, *, each: bool) -> dict[str, Map]:
    """Heat maps by title: of each weight, or the mean of those that differ in their layer only."""
    sums: dict[tuple[str, tuple[int, ...]], tuple[Map, int]] = {}
    for name, delta in adapter.items():
        key = (name if each else without_number(name), delta.support.shape)
        made = heat_map(delta.support)
        total, count = sums.get(key, (np.zeros_like(made), 0))
        sums[key] = (total + made, count + 1)
    made_of = {count: f", mean of {count}" if count > 1 else "" for _, count in sums.values()}
    return {
        f"{shown(name)}\n{' x '.join(map(str, shape))}{made_of[count]}": total / count
        for (name, shape), (total, count) in sums.items()
    }


def _draw_maps(figure: Any, drawn: list[tuple[str, Map]], of: int, size: tuple[int, int]) -> None:
    title = "Share of entries trained, by place in the weight"
    figure.suptitle(title + (f" ({len(drawn)} of {of} drawn)" if len(drawn) < of else ""))
    if not drawn:
        return
    reach = max((float(made.max()) for _, made in drawn if made.size), default=0.0) or 1.0
    grid = figure.subplots(*size, squeeze=False)
    image = None
    for axes in grid.flat[len(drawn) :]:
        axes.set_axis_off()
    for axes, (name, made) in zip(grid.flat, drawn, strict=False):
        axes.set_title(_wrapped(name), fontsize=7, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
        if made.size:
            image = axes.imshow(made, cmap="viridis", vmin=0.0, vmax=reach, aspect="auto")
    if image is not None:
        figure.colorbar(image, ax=list(grid.flat), shrink=0.8, format=_percent)


def _draw_histogram(figure: Any, adapter: Adapter, summary: Summary) -> None:
    figures = summary.figures
    counts, edges = histogram(adapter.values(), figures.reach)
    label = "value"
    if figures.reach and not 1e-30 < figures.reach < 1e30:  # such axes end in an error
        label = f"value / {figures.reach:.3g}"
        edges = np.linspace(-1.0, 1.0, len(edges))
    axes = figure.add_subplot(xlabel=label, ylabel="entries")
    axes.set_title(f"Values: {figures.count:,} entries, {figures.zeros:,} zeros", fontsize=9)
    axes.stairs(counts, edges, fill=True)
    if counts.any():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8)


def _wrapped(name: str, width: int = 44) -> str:
    """A long name broken after a point, so that it stays within its picture."""
    first, newline, rest = name.partition("\n")
    first = first if len(first) <= 3 * width else f"{first[: 3 * width]}..."
    if len(first) > width:
        at = first.rfind(".", 0, width) + 1 or width
        first = f"{first[:at]}\n{first[at:]}"
    return first + newline + rest


def _percent(share: float, _position: int) -> str:
    digits = 0 if share >= 0.1 or not share else min(4, 1 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{digits}f} %"
