# SPDX-License-Identifier: Apache-2.0
"""The committed runs as pictures: validation over learning rate, as far as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from studies.accuracy.plan import tuning_runs, validation
from studies.accuracy.protocol import METHODS, SIZES, TUNING_TASKS, UNSIZED, rate_of
from studies.accuracy.runs import Done


def tuning(done: Mapping[str, Done], path: Path) -> bool:
    """Draw one panel a size, one line a method. False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    if not any(entry.run.stage == "tuning" for entry in done.values()):
        return False
    with pyplot.rc_context({"svg.hashsalt": "shira", "font.size": 8}):
        figure, panels = pyplot.subplots(1, len(SIZES), figsize=(9, 4), sharey=True)
        colours = pyplot.get_cmap("tab20")
        for panel, size in zip(panels, SIZES, strict=True):
            for number, method in enumerate(METHODS):
                points = _points(done, method, None if method in UNSIZED else size)
                rates, figures = zip(*points, strict=True) if points else ((), ())
                panel.plot(rates, figures, ".-", color=colours(number), label=method)
            panel.set_xscale("log")
            panel.set_title(f"{size}, r = {SIZES[size]}")
            panel.set_xlabel("learning rate")
        panels[0].set_ylabel(f"validation accuracy, mean of {', '.join(TUNING_TASKS)}, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7)
        figure.set_layout_engine("constrained")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return True


def _points(done: Mapping[str, Done], method: str, size: str | None) -> list[tuple[float, float]]:
    tried = validation(done, tuning_runs(done, method, size))
    return [(rate_of(e), 100 * figure) for e, figure in tried.items() if figure is not None]
