# SPDX-License-Identifier: Apache-2.0
"""The charts of a report, drawn by matplotlib, as SVG that stands inside the page.

The page's style sheet colours them, for a light and a dark page: marks have the classes ``s0`` and
``s1`` with ``bar``, ``line`` or ``point``, and a text that is shown where one points at them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from shira.cli.output import share
from shira.cli.pictures import axis_unit, histogram
from shira.cli.report.gather import Curve, Described
from shira.errors import shown

_STYLED = matplotlib.rc_context(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "shira",  # the same drawing is the same SVG
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "axes.formatter.use_mathtext": False,
        "font.size": 11,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
)
Titles = dict[str, list[str]]
"""Texts of the marks of each series, by the ``gid`` of their artists."""


@dataclass(frozen=True)
class Chart:
    """A chart: title, explanation, SVG (or a sentence why there is none), names of its series."""

    title: str
    about: str
    drawing: Markup
    legend: Sequence[str] = ()


def charts(described: Described) -> Iterator[Chart]:
    """Yield all charts of an adapter."""
    summary, every = described.summary, described.summary.all
    names = [target.name for target in summary.targets]
    about = f"{every.nnz:,} values, {every.figures.zeros:,} of them zero."
    yield Chart("Values", about, _histogram(*histogram(every.values)))

    sizes = [target.figures.mean_abs or 0.0 for target in summary.targets]
    drawing = _by_weight("mean absolute value", names, {"": sizes})
    yield Chart("Size of the deltas", "Mean absolute value in each weight.", drawing)

    if described.ranks:
        found = [described.ranks[name] for name in names]
        full = sum(rank.rank == rank.bound for rank in found)
        more = sum(rank.at_least for rank in found)
        about = f"{full} of {len(found)} weights have the highest rank that their entries allow"
        about += f"; of {more} the rank is at least what is shown" if more else ""
        series = {
            "numerical rank": [float(rank.rank) for rank in found],
            "stable rank": [rank.stable_rank for rank in found],
        }
        yield Chart(
            "Rank of the deltas",
            f"{about}. The stable rank says how many directions matter.",
            _by_weight("rank", names, series),
            list(series),
        )
    if every.vanishing is not None:
        told = share(every.vanishing, every.nnz - every.figures.zeros, "deltas other than zero")
        lost = [
            100 * (target.vanishing or 0) / max(target.nnz - target.figures.zeros, 1)
            for target in summary.targets
        ]
        yield Chart(
            "Lost to rounding",
            f"{told} change nothing in a bfloat16 copy of the base.",
            _by_weight("% lost in bf16", names, {"": lost}),
        )
    if described.curve is not None:
        yield _training(described.curve)


@_STYLED
def _training(curve: Curve) -> Chart:
    about = f"From {curve.file}."
    if curve.problem is not None:
        told = Markup('<p class="note">Not drawn: {}</p>').format(shown(curve.problem))
        return Chart("Training", about, told)
    if curve.every > 1:
        about += f" One of {curve.every} points is drawn."
    points = np.concatenate([np.array(points) for points in curve.series.values()])
    step_unit, x_label = axis_unit(points[:, 0], "optimizer step")
    loss_unit, y_label = axis_unit(points[:, 1], "loss")
    figure, axes = _axes(x_label, y_label)
    titles: Titles = {}
    for number, series in enumerate(curve.series.values()):
        steps, losses = np.array(series).T
        marker = "o" if len(series) <= 100 else None
        axes.plot(steps / step_unit, losses / loss_unit, gid=f"s{number}", marker=marker)
        titles[f"s{number}"] = [f"step {step:g}: {loss:.4g}" for step, loss in series]
    drawing = _inline(figure, "Loss over optimizer steps", titles)
    return Chart("Training", about, drawing, list(curve.series))


@_STYLED
def _histogram(counts: Any, edges: Any) -> Markup:
    """Draw how many values there are in each part of their range, on a logarithmic scale."""
    unit, label = axis_unit(edges, "value")
    figure, axes = _axes(label, "values")
    axes.set_yscale("log")
    axes.set_ylim(0.5, 1.2 * counts.max(initial=1) + 0.3)
    axes.set_xlim(edges[0] / unit, edges[-1] / unit)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    some = counts > 0
    counts, low, high = counts[some], edges[:-1][some], edges[1:][some]
    widths = (high / unit) - (low / unit)
    for bar in axes.bar(low / unit, counts - 0.5, widths, 0.5, align="edge"):
        bar.set_gid("s0")
    parts = zip(low, high, counts, strict=True)
    titles = [f"{first:.3g} to {last:.3g}: {count:,}" for first, last, count in parts]
    return _inline(figure, "Histogram of the values", {"s0": titles})


@_STYLED
def _by_weight(label: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> Markup:
    """Draw a point for each weight, in the order of the weights, for each of up to two series."""
    values = np.array(list(series.values()), dtype=np.float64)
    unit, y_label = axis_unit(values, label)
    figure, axes = _axes("weight, in the order of the table", y_label)
    titles: Titles = {}
    for which, row in enumerate(values):
        gid = f"s{which}"
        axes.plot(range(1, len(names) + 1), row / unit, gid=gid, marker="o", linestyle="none")
        told = zip(names, row, strict=True)
        titles[gid] = [f"{name}: {label} {value:.4g}" for name, value in told]
    axes.set_ylim(0.0, 1.05 * float((values / unit).max(initial=0.0)) or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _inline(figure, f"{label} of each weight", titles)


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Return an empty figure of 400 x 230 units, and its axes."""
    figure = Figure(figsize=(400 / 72, 230 / 72), layout="constrained")
    axes: Any = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", gid="grid")
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _inline(figure: Figure, label: str, titles: Titles) -> Markup:
    """Return a figure as SVG without styles, links and ids, which is read aloud as ``label``."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    attributes = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": label}
    drawn = ElementTree.Element("svg", attributes)
    drawn.extend(_shapes(root, "", {name: iter(texts) for name, texts in titles.items()}))
    return Markup(ElementTree.tostring(drawn, encoding="unicode"))


def _shapes(
    parent: ElementTree.Element, name: str, titles: Mapping[str, Iterator[str]]
) -> Iterator[ElementTree.Element]:
    """Yield what an artist, a series or the grid, drew, with classes in the place of styles."""
    for element in parent:
        kind, style = element.tag.rpartition("}")[2], element.get("style", "")
        made = ElementTree.Element(kind)
        if kind == "g":
            gid = element.get("id")
            yield from _shapes(element, gid if gid in (*titles, "grid") else name, titles)
            continue
        if kind == "text":
            for key in ("x", "y", "transform"):
                made.set(key, _rounded(element.get(key, "")))
            made.set("style", "".join(re.findall(r"text-anchor: \w+", style)))
            made.text = element.text
        elif kind == "use":  # a marker
            place = {f"c{key}": _rounded(element.get(key, "0")) for key in "xy"}
            made = ElementTree.Element("circle", {"class": f"{name} point", "r": "3", **place})
        elif kind == "path":
            made.set("class", name or "axis")
            if name in titles:
                made.set("class", f"{name} {'line' if 'fill: none' in style else 'bar'}")
            made.set("d", _rounded(element.get("d", "")))
        else:
            continue  # definitions and metadata
        if made.get("class", "").endswith(("point", "bar")):
            ElementTree.SubElement(made, "title").text = shown(next(titles[name]))
        yield made


def _rounded(numbers: str) -> str:
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", " ".join(numbers.split()))
