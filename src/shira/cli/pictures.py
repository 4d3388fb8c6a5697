# SPDX-License-Identifier: Apache-2.0
"""Pictures: a figure of matplotlib's written as a PNG, and the numbers that are drawn.

Heat maps and histograms are counted entry by entry, O(k); no picture of the size of a weight is
made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shira.adapter import Adapter
from shira.cli.output import needed_for, shape_text
from shira.cli.summary import Summary, known_shapes, without_number
from shira.delta import SparseDelta
from shira.errors import ConfigError, shown
from shira.store.atomic import write_atomically
from shira.support import Support, matrix_shape

CELLS = 96
"""Rows and columns of a heat map at most."""

Map = NDArray[np.float64]
_MOST = 24  # heat maps in one picture
_ACROSS = 4


def new_figure(size: tuple[float, float], what: str) -> Any:
    """Return an empty figure of a width and height in inches; ``what`` needs matplotlib."""
    with needed_for(what, "matplotlib"):
        from matplotlib.figure import Figure
    return Figure(figsize=size, layout="constrained")


def new_drawing(size: tuple[float, float], option: str, path: Path) -> Any:
    """Return an empty figure for a PNG at the path of an option, whose folder must be there."""
    figure = new_figure(size, option)
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    return figure


def write_drawing(drawing: Any, path: Path, **options: Any) -> None:
    """Write a figure as a PNG, in the place of whatever file is at ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(drawing)
    buffer = BytesIO()
    drawing.savefig(buffer, format="png", **options)
    write_atomically(path, buffer.getbuffer())


def heat_map(support: Support, parts: tuple[int, int] = (CELLS, CELLS)) -> NDArray[np.float64]:
    """Return the share of the entries that are trained, in each of up to 96 x 96 parts.

    More than two dimensions count as a matrix of ``shape[0]`` rows. The parts, at most so many rows
    and columns of them, are as even as they can be: part i of p holds the rows from
    ``ceil(i * rows / p)`` on.

    Returns:
        float64, rows by columns of parts; each between 0 and 1.
    """
    rows, cols = matrix_shape(support.shape)
    down, across = min(rows, parts[0]), min(cols, parts[1])
    if not down or not across:
        return np.zeros((0, 0))
    row, col = np.divmod(support.indices.cpu().numpy().astype(np.int64), cols)
    part = row * down // rows * across + col * across // cols
    counts = np.bincount(part, minlength=down * across).reshape(down, across)
    return counts / np.outer(_sizes(rows, down), _sizes(cols, across))


def histogram(
    deltas: Iterable[SparseDelta], reach: float, bins: int = 101
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count the values in each of ``bins`` equal parts of ``[-reach, reach]``; a reach of 0 is 1.

    Returns:
        int64 ``(bins,)`` counts and float64 ``(bins + 1,)`` edges.
    """
    edges = np.linspace(-1.0, 1.0, bins + 1) * (reach or 1.0)  # 2 * reach may be too large
    counts = np.zeros(bins, np.int64)
    for delta in deltas:
        values = delta.values.detach().to("cpu", torch.float64).numpy()
        counts += np.histogram(values, edges)[0]
    return counts, edges


def to_draw(values: NDArray[np.float64], label: str) -> tuple[NDArray[np.float64], str]:
    """Return values for an axis, and its label; divided by the largest if matplotlib needs it.

    Axes of numbers near the ends of float64 end in an error.
    """
    reach = float(np.abs(values).max(initial=0.0))
    if not reach or 1e-30 < reach < 1e30:
        return values, label
    return values / reach, f"{label} / {reach:.3g}"


def _sizes(size: int, parts: int) -> NDArray[np.int64]:
    """Return the rows (or columns) in each part: i belongs to part ``i * parts // size``."""
    starts = -(-np.arange(parts + 1, dtype=np.int64) * size // parts)
    return np.diff(starts)


def plot_adapter(summary: Summary, path: Path, *, each: bool = False) -> None:
    """Draw an adapter as a PNG.

    Weights of like name and shape in different layers share a heat map, the mean of theirs, unless
    ``each``; of more than 24 maps the first are drawn and the title says of how many.
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
    """Return heat maps by title, of each weight or of those that differ in their layer only."""
    sums: dict[tuple[str, tuple[int, ...]], tuple[Map, int]] = {}
    for name, delta in adapter.items():
        key = (name if each else without_number(name), delta.support.shape)
        made = heat_map(delta.support)
        total, count = sums.get(key, (np.zeros_like(made), 0))
        sums[key] = (total + made, count + 1)
    made_of = {count: f", mean of {count}" if count > 1 else "" for _, count in sums.values()}
    return {
        f"{shown(name)}\n{shape_text(shape)}{made_of[count]}": total / count
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
    figures = summary.all.figures
    counts, edges = histogram(adapter.values(), figures.reach)
    edges, label = to_draw(edges, "value")
    axes = figure.add_subplot(xlabel=label, ylabel="entries")
    axes.set_title(f"Values: {figures.count:,} entries, {figures.zeros:,} zeros", fontsize=9)
    axes.stairs(counts, edges, fill=True)
    if counts.any():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8)


def _wrapped(name: str, width: int = 44) -> str:
    """Break a long name after a point, so that it stays within its picture."""
    first, newline, rest = name.partition("\n")
    first = first if len(first) <= 3 * width else f"{first[: 3 * width]}..."
    if len(first) > width:
        at = first.rfind(".", 0, width) + 1 or width
        first = f"{first[:at]}\n{first[at:]}"
    return first + newline + rest


def _percent(share: float, _position: int) -> str:
    digits = 0 if share >= 0.1 or not share else min(4, 1 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{digits}f} %"
