# SPDX-License-Identifier: Apache-2.0
"""Puts tables and figures into docs/study-lm.md, between its markers: a part for each arm."""

from __future__ import annotations

from pathlib import Path

from studies.lm import tables
from studies.lm.plan import curve, plan
from studies.lm.protocol import DEVICES, GAIN, METHODS, SIZES, TUNING_TARGETS, Arm, Run, arm_of
from studies.lm.runs import STUDY, Done, load
from studies.page import DOCS, fill

PAGE = "study-lm.md"
MOST = 1.5
"""Added to the source's loss, in nats: up to here it is drawn."""


def rebuild(docs: Path = DOCS, results: Path = STUDY.results) -> list[str]:
    """Write tables and figures from the runs in `results`; returns what to say.

    Raises:
        ValueError: If the page has lost its markers, or a run cannot be read.
    """
    done = load(results)
    made = {(entry.run.device, entry.run.dtype) for entry in done.values()}
    arms = [Arm(*each) for each in sorted(made)] or [arm_of("cpu")]
    said, parts, files = [], [], [PAGE]
    for arm in arms:
        left = plan(done, arm)
        stages = [e.run.stage for e in done.values() if _is_of(e.run, arm)]
        least = "at least " if left.unknown_finals else ""
        counts = {
            "tuning": f"{least}{len(left.tuning)}",
            "final": f"{least}{len(left.final) + left.unknown_finals}",
        }
        said.append(
            f"{arm.device}, {arm.dtype}: "
            + "; ".join(f"{stages.count(s)} {s} runs made, {n} missing" for s, n in counts.items())
        )
        sizes = DEVICES[arm.device]
        parts += [
            f"### On {'a GPU' if arm.device == 'cuda' else 'a CPU'}, {arm.dtype}",
            f"{said[-1]}. A run is {sizes.steps} steps of {sizes.batch} windows of {sizes.window} "
            "tokens.",
            "**The screen**: every method on one target, at the small size, one seed, on "
            f"validation text. What is added to the source's loss at {GAIN:.0%} of LoRA's gain is "
            "interpolated between two neighbouring rates.",
            tables.screen(done, arm),
        ]
        name = f"study-lm-{arm.device}-{arm.dtype}.svg"
        if frontier(done, arm, docs / name):
            parts.append(f"![Loss added to the source over that of the target]({name})")
            files.append(name)
        parts += [
            "**Tuned rates**: one seed, validation text.",
            tables.tuning(done, arm),
            "**Finals**: test text, the seeds made by all methods of a size, 95 % intervals.",
            tables.finals(done, arm),
            "**Paired with the best low-rank method**, mean of the targets, 95 % intervals over "
            "the seeds. What a method adds to the source's loss more than the low-rank one, both "
            "scaled to a share of the low-rank one's gain.",
            tables.paired(done, arm),
        ]
    fill(docs / PAGE, parts)
    return [*said, f"written: {', '.join(files)}"]


def _is_of(run: Run, arm: Arm) -> bool:
    return Arm(run.device, run.dtype) == arm


def frontier(done: Done, arm: Arm, path: Path) -> bool:
    """Draw the tuning runs: a panel a target and size, a line a method. False without runs."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    made = [e for e in done.values() if e.run.stage == "tuning" and _is_of(e.run, arm)]
    runs, before = [e.run for e in made], made[0].result["source_before"] if made else 0.0
    panels = [
        (target, size)
        for size in SIZES
        for target in TUNING_TARGETS
        if any((run.target, run.size) == (target, size) for run in runs)
    ]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with pyplot.rc_context({"svg.hashsalt": "shira", "font.size": 8}):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(1.5 + 3.4 * columns, 1.2 + 3 * rows), squeeze=False
        )
        colours = pyplot.get_cmap("tab20")
        for axis, (target, size) in zip(axes.flat, panels, strict=False):
            for number, method in enumerate(METHODS):
                points = curve(done, arm, method, size, target).values()
                drawn = [
                    (loss, source - before) for loss, source in points if source - before <= MOST
                ]
                if drawn:
                    losses, added = zip(*drawn, strict=True)
                    axis.plot(losses, added, ".-", color=colours(number), label=method, linewidth=1)
            axis.set_title(f"{target}, {size}")
            axis.set_xlabel("loss on the target")
            axis.set_ylabel("added to the loss on the source")
        found = {}
        for axis in axes.flat:
            found.update(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(found.values(), found, loc="outside lower center", ncols=4)
        figure.set_layout_engine("constrained")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return True
