# SPDX-License-Identifier: Apache-2.0
"""The committed runs as a picture: what each rate gains on the target and loses on the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from studies.language.protocol import METHODS, TARGETS
from studies.language.store import Done

MOST = 1000.0
"""Perplexity of the source up to which it is drawn: beyond that the model has lost it."""


def trade(done: Mapping[str, Done], path: Path) -> bool:
    """Draw one panel a target, one line a method. False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    if not done:
        return False
    with pyplot.rc_context({"svg.hashsalt": "shira", "font.size": 8}):
        figure, panels = pyplot.subplots(
            1, len(TARGETS), figsize=(3.6 * len(TARGETS), 3.8), squeeze=False
        )
        colours = pyplot.get_cmap("tab20")
        for panel, target in zip(panels[0], TARGETS, strict=True):
            by_method = {method: _points(done, target, method) for method in METHODS}
            for number, (method, points) in enumerate(by_method.items()):
                gained, kept = zip(*points, strict=True) if points else ((), ())
                panel.plot(gained, kept, ".-", color=colours(number), label=method, linewidth=1)
            if any(by_method.values()):  # an axis without a point cannot be logarithmic
                panel.set_xscale("log")
                panel.set_yscale("log")
                for axis in (panel.xaxis, panel.yaxis):
                    axis.set_major_formatter(ScalarFormatter())
                    axis.set_minor_formatter(NullFormatter())
            panel.set_title(target)
            panel.set_xlabel("perplexity of the target, validation")
            panel.set_ylabel("perplexity of the source, validation")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        figure.set_layout_engine("constrained")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return True


def _points(done: Mapping[str, Done], target: str, method: str) -> list[tuple[float, float]]:
    """Perplexities of target and source, from the lowest rate to the highest, on one seed."""
    found = []
    for entry in done.values():
        run, result = entry.run, entry.result
        if (run.target, run.method) != (target, method) or run.stage == "final":
            continue
        losses = result["target_validation"], result["source_validation"]
        if None not in losses and losses[1] <= math.log(MOST):
            found.append((run.rate_exponent, math.exp(losses[0]), math.exp(losses[1])))
    return [(gained, kept) for _, gained, kept in sorted(found)]
