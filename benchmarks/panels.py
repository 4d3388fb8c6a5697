# SPDX-License-Identifier: Apache-2.0
"""What is drawn of each suite: its JSON document made into panels, a row in `PANELS` each.

A panel is bars with their spread, or lines over an axis. How they look is for `figures` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MIB = 2**20


class Bar(NamedTuple):
    """A value and its quartiles, which are the value itself where one thing was measured once."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: What is compared.
        unit: What the values are in.
        bars: A bar for each label, or
        lines: for each name its values at ``axis``, or None.
        axis: The points of the lines, and
        axis_name: what they are.
        log: Whether the values are drawn on a logarithmic scale.
    """

    title: str
    unit: str
    bars: Mapping[str, Bar] | None = None
    lines: Mapping[str, list[Bar]] | None = None
    axis: tuple[float, ...] = ()
    axis_name: str = ""
    log: bool = False


def _spread(summary: Mapping[str, float], factor: float = 1) -> Bar:
    return Bar(*(factor * summary[name] for name in ("median", "q1", "q3")))


def _exact(value: float) -> Bar:
    return Bar(value, value, value)


def _ratios(rows: Mapping[str, Any], key: str) -> dict[str, Bar]:
    return {name: _spread(row[key]) for name, row in rows.items()}


def _training(result: dict[str, Any]) -> list[Panel]:
    rows = result["results"]
    panels = [Panel("Seconds of a step", "x floor", _ratios(rows, "wall_ratio"))]
    peaks = {
        name: _exact(row["memory_bytes"]["rss"]["over_base"] / MIB)
        for name, row in rows.items()
        if row["memory_bytes"] is not None
    }
    return [*panels, Panel("Peak memory over the base", "MiB", peaks)] if peaks else panels


def _kernel(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            f"The gradient at the entries, {shape}",
            "x the layer's two products",
            {
                name: _spread(row["over_products"])
                for name, row in rows.items()
                if isinstance(row, dict) and "over_products" in row
            },
        )
        for shape, rows in result["results"].items()
    ]


def _growth(result: dict[str, Any]) -> list[Panel]:
    panels = []
    for axis, points in result["results"].items():
        for title, unit, read in (
            ("Seconds of a step", "x floor", lambda row: _spread(row["wall_ratio"])),
            ("Peak memory", "MiB", lambda row: _exact(row["peak_bytes"] / MIB)),
        ):
            panels.append(
                Panel(
                    f"{title} over {axis}",
                    unit,
                    lines={
                        name: [read(rows[name]) for rows in points.values()]
                        for name in next(iter(points.values()))
                    },
                    axis=tuple(float(point) for point in points),
                    axis_name=axis,
                )
            )
    return panels


def _masks(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            "Choosing the entries of a layer at random",
            "ms",
            {
                f"{name}, {shape}": _spread(seconds, 1e3)
                for shape, row in result["results"]["layers"].items()
                for name, seconds in row["wall_seconds"].items()
            },
            log=True,
        )
    ]


def _mixed_batch(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(f"{case} (samples x tokens x adapters)", "x floor", _ratios(rows, "wall_ratio"))
        for case, rows in result["results"].items()
    ]


def _switching(result: dict[str, Any]) -> list[Panel]:
    layer = result["results"]["layer"]["there_and_back"]
    return [
        Panel(
            "An adapter in and out again, one layer",
            "ms",
            {name: _spread(row, 1e3) for name, row in layer.items()},
            log=True,
        )
    ]


def _merging(result: dict[str, Any]) -> list[Panel]:
    rows = result["results"]["contenders"]
    return [
        Panel("Seconds", "x a copy of the files", _ratios(rows, "over_copy")),
        Panel(
            "Peak memory",
            "MB",
            {
                name: _exact(row["peak_bytes"] / 1e6)
                for name, row in rows.items()
                if row["peak_bytes"] is not None
            },
        ),
    ]


def _fusing(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            f"Two adapters made one, {result['results']['k']:,} entries each",
            "ms",
            {
                name: _spread(row["seconds"], 1e3)
                for name, row in result["results"]["methods"].items()
            },
            log=True,
        )
    ]


def _chain(result: dict[str, Any]) -> list[Panel]:
    steps = result["results"]["steps"]
    ways = next(iter(steps.values()))["bytes_a_changed_entry"]
    return [
        Panel(
            "A step of a bf16 checkpoint, bytes a changed entry",
            "bytes",
            lines={
                way: [_exact(row["bytes_a_changed_entry"][way]) for row in steps.values()]
                for way in ways
            },
            axis=tuple(100 * row["changed_share"] for row in steps.values()),
            axis_name="entries changed, %",
        )
    ]


def _files(result: dict[str, Any]) -> list[Panel]:
    sizes = result["results"]["bytes_an_entry"]
    return [
        Panel(
            "A stored adapter",
            "bytes an entry",
            {name: _exact(size) for name, size in sizes.items()},
        )
    ]


def _serving(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(
            "Seconds of the whole load (server/load)",
            "x base/base",
            _ratios(result["results"]["loads"], "wall_ratio"),
        )
    ]


def _policy(result: dict[str, Any]) -> list[Panel]:
    rows = result["results"]
    return [
        Panel(
            "Until a server answers with a new policy",
            "ms",
            {name: _spread(row["update"], 1e3) for name, row in rows.items()},
            log=True,
        ),
        Panel("Seconds a token", "x full", _ratios(rows, "token_ratio")),
    ]


def _gpu(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(f"Seconds of a step, targets: {which}", "x floor", _ratios(rows, "wall_ratio"))
        for which, rows in result["results"].items()
    ]


def _gpu_adapters(result: dict[str, Any]) -> list[Panel]:
    return [
        Panel(part, "x the reference", _ratios(rows, "wall_ratio"), log=True)
        for part, rows in result["results"].items()
    ]


PANELS: Mapping[str, Callable[[dict[str, Any]], list[Panel]]] = {
    "training": _training,
    "kernel": _kernel,
    "growth": _growth,
    "masks": _masks,
    "mixed_batch": _mixed_batch,
    "switching": _switching,
    "merging": _merging,
    "fusing": _fusing,
    "files": _files,
    "chain": _chain,
    "serving": _serving,
    "policy": _policy,
    "gpu": _gpu,
    "gpu_adapters": _gpu_adapters,
}
