# SPDX-License-Identifier: Apache-2.0
"""Pictures: a figure of matplotlib's written as a PNG, and the numbers that are drawn.

Heat maps and histograms are counted entry by entry, O(k); no picture of the size of a weight is
made.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shira.adapter import Adapter
from shira.cli.output import needed_for, shape_text
from shira.cli.summary import Summary, without_number
from shira.errors import ConfigError, shown
from shira.store.atomic import write_atomically
from shira.support import Support, matrix_shape

CELLS = 96
"""Rows and columns of a heat map at most."""

Map = NDArray[np.float64]
_MOST = 24  # heat maps in one picture
_ACROSS = 4


def new_drawing(size: tuple[float, float], option: str, path: Path) -> Any:
    """Return an empty figure, in inches, for a PNG at the path of an option, in a folder."""
    with needed_for(option, "matplotlib"):
        from matplotlib.figure import Figure
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
    return Figure(figsize=size, layout="constrained")


def write_drawing(drawing: Any, path: Path, **options: Any) -> None:
    """Write a figure as a PNG, in the place of whatever file is at ``path``."""
    buffer = BytesIO()
    drawing.savefig(buffer, format="png", **options)
    write_atomically(path, buffer.getbuffer())


def heat_map(support: Support, parts: tuple[int, int] = (CELLS, CELLS)) -> Map:
    """Return the share of the entries, 0 to 1, that are trained in each of up to 96 x 96 parts.

    More than two dimensions count as a matrix of ``shape[0]`` rows. The parts are as even as they
    can be: part i of p holds the rows from ``ceil(i * rows / p)`` on.
    """
    rows, cols = matrix_shape(support.shape)
    down, across = min(rows, parts[0]), min(cols, parts[1])
    if not down or not across:
        return np.zeros((0, 0))
    row, col = np.divmod(support.indices.cpu().numpy().astype(np.int64), cols)
    part = row * down // rows * across + col * across // cols
    counts = np.bincount(part, minlength=down * across).reshape(down, across)
    heights, widths = (
        np.diff(-(-np.arange(parts + 1, dtype=np.int64) * size // parts))
        for size, parts in ((rows, down), (cols, across))
    )
    shares: Map = counts / np.outer(heights, widths)
    return shares


def histogram(
    parts: Sequence[Tensor], bins: int = 101
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count values in equal parts from minus to plus the largest; return counts and edges."""
    reach = max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
    edges = np.linspace(-1.0, 1.0, bins + 1) * (reach or 1.0)  # 2 * reach may be too large
    counts = np.zeros(bins, np.int64)
    for part in parts:
        counts += np.histogram(part.double().numpy(), edges)[0]
    return counts, edges


def axis_unit(values: NDArray[np.float64], label: str) -> tuple[float, str]:
    """Return what to divide values by on an axis, and the axis's label.

    That is the largest where axes of such numbers, near the ends of float64, end in an error.
    """
    reach = float(np.abs(values).max(initial=0.0))
    if not reach or 1e-30 < reach < 1e30:
        return 1.0, label
    return reach, f"{label} / {reach:.3g}"


def plot_adapter(summary: Summary, path: Path, *, each: bool = False) -> None:
    """Draw an adapter as a PNG.

    Weights of like name and shape in different layers share a heat map, the mean of theirs, unless
    ``each``; of more than 24 maps the first are drawn and the title says of how many.
    """
    maps = mean_maps(summary.required_adapter("--plot"), each=each)
    drawn = list(maps.items())[:_MOST]
    across = min(_ACROSS, max(1, len(drawn)))
    down = max(1, -(-len(drawn) // across))
    drawing = new_drawing((3.4 * across + 1.0, 3.0 * down + 2.6), "--plot", path)
    top, bottom = drawing.subfigures(2, 1, height_ratios=[3.0 * down, 2.6])
    title = "Share of entries trained, by place in the weight"
    top.suptitle(title + (f" ({len(drawn)} of {len(maps)} drawn)" if len(maps) > _MOST else ""))
    if drawn:
        _draw_maps(top, top.subplots(down, across, squeeze=False), drawn)
    counts, edges = histogram(summary.all.values)
    unit, label = axis_unit(edges, "value")
    axes = bottom.add_subplot(xlabel=label, ylabel="entries")
    zeros = summary.all.figures.zeros
    axes.set_title(f"Values: {summary.all.nnz:,} entries, {zeros:,} zeros", fontsize=9)
    axes.stairs(counts, edges / unit, fill=True)
    if counts.any():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8)
    write_drawing(drawing, path, dpi=110)


def mean_maps(adapter: Adapter, *, each: bool) -> dict[str, Map]:
    """Return heat maps by title, of each weight or of those that differ in their layer only."""
    maps: dict[tuple[str, tuple[int, ...]], list[Map]] = {}
    for name, delta in adapter.items():
        key = (name if each else without_number(name), delta.support.shape)
        maps.setdefault(key, []).append(heat_map(delta.support))
    titled = {}
    for (name, shape), like in maps.items():
        of = f", mean of {len(like)}" if len(like) > 1 else ""
        titled[f"{shown(name)}\n{shape_text(shape)}{of}"] = np.mean(like, axis=0)
    return titled


def _draw_maps(figure: Any, grid: Any, drawn: list[tuple[str, Map]]) -> None:
    from matplotlib.ticker import PercentFormatter

    reach = max((float(made.max()) for _, made in drawn if made.size), default=0.0) or 1.0
    image = None
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, made) in zip(grid.flat, drawn, strict=False):
        first, *rest = name.split("\n")
        title = "\n".join([*textwrap.wrap(first, 44, max_lines=3), *rest])
        axes.set_title(title, fontsize=7, parse_math=False)
        if made.size:
            image = axes.imshow(made, cmap="viridis", vmin=0.0, vmax=reach, aspect="auto")
    if image is not None:
        figure.colorbar(image, ax=list(grid.flat), shrink=0.8, format=PercentFormatter(1.0))
