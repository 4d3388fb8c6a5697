# SPDX-License-Identifier: Apache-2.0
"""The committed runs as pictures: validation over learning rate, as far as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from studies.accuracy.protocol import SIZES, TASKS, UNSIZED, cells, rate_of
from studies.accuracy.store import Done


def tuning(done: Mapping[str, Done], path: Path) -> bool:
    """Draw one panel a size and task, one line a method. False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    if not any(entry.run.stage == "tuning" for entry in done.values()):
        return False
    with pyplot.rc_context({"svg.hashsalt": "shira", "font.size": 8}):
        figure, panels = pyplot.subplots(
            len(SIZES), len(TASKS), figsize=(3 * len(TASKS), 2.6 * len(SIZES)), squeeze=False
        )
        colours = pyplot.get_cmap("tab20")
        methods = list(dict.fromkeys(method for method, _ in cells()))
        for row, size in zip(panels, SIZES, strict=True):
            for panel, task in zip(row, TASKS, strict=True):
                for number, method in enumerate(methods):
                    points = _points(done, task, method, None if method in UNSIZED else size)
                    rates, figures = zip(*points, strict=True) if points else ((), ())
                    panel.plot(rates, figures, ".-", color=colours(number), label=method)
                panel.set_xscale("log")
                panel.set_title(f"{task}, {size}")
                panel.set_xlabel("learning rate")
                panel.set_ylabel(f"validation {TASKS[task]}")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7)
        figure.set_layout_engine("constrained")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return True


def _points(
    done: Mapping[str, Done], task: str, method: str, size: str | None
) -> list[tuple[float, float]]:
    return sorted(
        (rate_of(entry.run.rate_exponent), entry.result["validation"])
        for entry in done.values()
        if (entry.run.stage, entry.run.task, entry.run.method, entry.run.size)
        == ("tuning", task, method, size)
    )
