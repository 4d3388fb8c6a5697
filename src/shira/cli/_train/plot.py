# SPDX-License-Identifier: Apache-2.0
"""The plot of the losses of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shira.cli.pictures import new_drawing, write_drawing


def plot_losses(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw training and evaluation loss over the optimizer steps as a PNG.

    Args:
        history: what was logged; lines with ``loss`` or ``eval_loss`` and ``step`` are drawn.
        path: where to write it.

    Returns:
        Whether there was anything to draw.
    """
    figure = new_drawing((6.4, 4.0), "--output", path)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    curves = (("loss", "training", "."), ("eval_loss", "evaluation", "o"))
    drawn = False
    for key, label, marker in curves:
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, marker=marker, label=label)
            drawn = True
    if drawn:
        axes.legend()
        axes.grid(alpha=0.3)
        write_drawing(figure, path)
    return drawn
