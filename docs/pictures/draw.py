# SPDX-License-Identifier: Apache-2.0
"""Draws idea.svg and masks.svg beside itself: ``python docs/pictures/draw.py [FOLDER]``.

The masks are those that `shira.masks` chooses, for a weight small enough to see its entries.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D

from shira import Support
from shira.masks import MASKS, random_support

SHAPE, ENTRIES = (24, 24), 72
BASE, OURS, RULE = "#e0e0e0", "#00796b", "#bdbdbd"
STYLE = {"font.size": 10, "svg.hashsalt": "shira"}


def masks() -> dict[str, Support]:
    """A support of each kind of mask, of one weight with one gradient."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    given: dict[str, tuple[tuple[Any, ...], dict[str, int]]] = {
        "random": ((SHAPE,), {"seed": 0}),
        "struct": ((SHAPE,), {}),
        "magnitude": ((weight,), {}),
        "grad": ((gradient,), {}),
        "snip": ((weight, gradient), {}),
        "block": ((SHAPE,), {"seed": 0, "block_size": 4}),
        "block_diagonal": ((SHAPE,), {"block_size": 4}),
    }
    return {
        name: MASKS[name].select(*first, ENTRIES, **options)
        for name, (first, options) in given.items()
    }


def idea() -> Figure:
    """The base, the adapter, and the base with the adapter in it."""
    support = random_support((10, 10), 9, seed=3)
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    panels = figure.subplots(1, 3)
    captions = (
        ("the base", "m x n weights, frozen", None, True),
        ("an adapter", "k positions, a value at each", support, False),
        ("the base with it", "k overwritten, k originals kept", support, True),
    )
    for axes, (title, below, entries, base) in zip(panels, captions, strict=True):
        _grid(axes, (10, 10), entries, base)
        axes.set_title(title)
        axes.set_xlabel(below)
    return figure


def all_masks() -> Figure:
    """Each kind of mask, at the same number of entries."""
    chosen = masks()
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panels = list(figure.subplots(2, 4).flat)
    for axes, (name, support) in zip(panels, chosen.items(), strict=False):
        _grid(axes, SHAPE, support, base=True)
        axes.set_title(name)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    return figure


def _grid(axes: Any, shape: tuple[int, int], entries: Support | None, base: bool) -> None:
    rows, cols = shape
    axes.set_facecolor(BASE if base else "white")
    if entries is not None:
        squares = [Outline.unit_rectangle().transformed(_move(x, y)) for y, x in _places(entries)]
        axes.add_patch(PathPatch(Outline.make_compound_path(*squares), facecolor=OURS, linewidth=0))
    rule = {"colors": "white" if base else RULE, "linewidth": 0.5}
    axes.hlines(range(rows + 1), 0, cols, **rule)
    axes.vlines(range(cols + 1), 0, rows, **rule)
    axes.set(xlim=(0, cols), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def _places(entries: Support) -> list[list[int]]:
    return entries.coordinates().T.tolist()


def _move(x: int, y: int) -> Affine2D:
    return Affine2D().translate(x, y)


def main(folder: Path) -> None:
    for name, picture in (("idea", idea), ("masks", all_masks)):
        with matplotlib.rc_context(STYLE):
            picture().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
