# SPDX-License-Identifier: Apache-2.0
"""The picture of all pairs: a matrix of one figure, coloured and with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from shira.cli._fuse.pairs import FIGURES
from shira.cli.pictures import new_drawing, write_drawing
from shira.errors import shown
from shira.measure import Overlap


def plot_matrix(names: Sequence[str], found: Sequence[Overlap], figure: str, path: Path) -> None:
    """Draw one figure of all pairs as a PNG; the diagonal stays empty.

    Args:
        names: Of the adapters.
        found: Their pairs, as `all_pairs` gives them.
        figure: One of `FIGURES`.
        path: Where to write it.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        ConfigError: If the folder of ``path`` does not exist.
    """
    at = {name: number for number, name in enumerate(names)}
    size = len(names)
    values = [[math.nan] * size for _ in names]
    for pair in found:
        i, j = at[pair.a], at[pair.b]
        values[i][j] = values[j][i] = FIGURES[figure](pair)
    known = [value for row in values for value in row if not math.isnan(value)]
    signed = figure == "cosine"
    # AWOM may be beyond float64, and colours are of what is not
    reach = max((abs(value) for value in known if math.isfinite(value)), default=0.0) or 1.0
    side = max(3.6, 0.9 * size + 1.8)
    drawing = new_drawing((side + 0.8, side), "--plot", path)
    axes = drawing.add_subplot(title=f"{figure} of all pairs")
    image = axes.imshow(
        [[max(min(value / reach, 1.0), -1.0) for value in row] for row in values],
        cmap="RdBu_r" if signed else "viridis",
        vmin=-1.0 if signed else 0.0,
        vmax=1.0,
    )
    labels = [shown(name)[:60] for name in names]
    axes.set_xticks(range(size), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(size), labels, parse_math=False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                dark = abs(value) > 0.6 * reach if signed else value < 0.6 * reach
                axes.text(
                    j,
                    i,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
    drawing.colorbar(
        image, ax=axes, shrink=0.8, format=lambda share, _position: f"{share * reach:.3g}"
    )
    write_drawing(drawing, path)
