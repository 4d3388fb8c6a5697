# SPDX-License-Identifier: Apache-2.0
"""Suite ``growth``: how a training step grows with density, tokens, width and depth.

One of the four is varied at a time around the middle (1 layer, width 1024, 512 tokens, 2 %); at
each point the contenders of ``training`` run interleaved. Memory is what torch's allocator held
above what was there before: at the highest point of a step (``peak``: saved inputs and
activations, gradients, scratch), and of a forward pass with its graph (``activation``). The time
of making the masks is that of ``get_peft_model``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from benchmarks import contenders, environment, memory, report
from benchmarks.contenders import REFERENCE, Workload
from benchmarks.timing import interleave, keep_freed_memory, ratios, summary
from benchmarks.training import step

NAME = "growth"
MIB = 2**20


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    density: str = field(default="0.005,0.01,0.02,0.04", metadata={"help": "shares trained"})
    tokens: str = field(default="64,256,1024,4096", metadata={"help": "tokens in a batch"})
    width: str = field(default="512,1024,2048,4096", metadata={"help": "hidden sizes"})
    depth: str = field(default="1,2,4", metadata={"help": "decoder layers"})
    middle: str = field(
        default="0.02,512,1024,1", metadata={"help": "density,tokens,width,depth around which"}
    )
    repeats: int = field(default=5, metadata={"help": "timed rounds"})
    contenders: str = field(
        default="shira,shira-block,peft-shira,peft-lora,full",
        metadata={"help": "names, separated by commas; the floor is always there"},
    )


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Every point of every axis; the whole JSON document of the suite."""
    surroundings = {**environment.describe(), "freed_memory": keep_freed_memory()}
    neighbours = environment.Neighbours()
    names = [REFERENCE, *settings.contenders.split(",")]
    middle = dict(
        zip(("density", "tokens", "width", "depth"), settings.middle.split(","), strict=True)
    )
    results: dict[str, Any] = {}
    for axis in middle:
        for value in getattr(settings, axis).split(","):
            progress(f"growth: {axis} {value}")
            point = _point(_workload({**middle, axis: value}), names, settings.repeats)
            results.setdefault(axis, {})[value] = point
    surroundings["cpu_share_of_others"] = neighbours.share()
    return report.document(NAME, asdict(settings), surroundings, {"results": results})


def _workload(at: dict[str, str]) -> Workload:
    width, tokens = int(at["width"]), int(at["tokens"])
    return Workload(
        layers=int(at["depth"]),
        hidden=width,
        intermediate=width * 11 // 4,
        heads=width // 128 or 1,
        vocab=512,
        batch=max(1, tokens // 256),
        tokens=min(tokens, 256),
        density=float(at["density"]),
    )


def _point(work: Workload, names: list[str], repeats: int) -> dict[str, Any]:
    base, inputs = contenders.base_model(work), contenders.batch(work)
    field_of, making = {}, {}
    for name in names:
        copied = copy.deepcopy(base)
        begun = time.perf_counter()
        field_of[name] = contenders.build(name, copied, work)
        making[name] = time.perf_counter() - begun
    runs = {name: partial(step, field_of[name], inputs) for name in names}
    laps = interleave(runs, repeats)
    floor = [lap.total.wall for lap in laps[REFERENCE]]
    rows = {}
    for name in names:
        wall = [lap.total.wall for lap in laps[name]]
        rows[name] = {
            "wall_seconds": summary(wall),
            "wall_ratio": ratios(wall, floor),
            "make_seconds": making[name],
            "peak_bytes": memory.allocator_peak(runs[name]),
            "activation_bytes": memory.allocator_peak(partial(field_of[name].forward, inputs)),
        }
    return rows


def tables(result: dict[str, Any]) -> list[report.Table]:
    """A table for each axis."""
    made = []
    for axis, points in result["results"].items():
        names = list(next(iter(points.values())))
        table = report.Table(
            f"Growth with {axis}: step x floor (median), in brackets peak MiB",
            [axis, *names],
            notes=report.busy_note(result),
        )
        for value, rows in points.items():
            table.rows.append(
                [value]
                + [
                    f"{row['wall_ratio']['median']:.2f} ({row['peak_bytes'] / MIB:.0f})"
                    for row in rows.values()
                ]
            )
        made.append(table)
    return made
