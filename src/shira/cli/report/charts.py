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

import numpy as np
from markupsafe import Markup

from shira.cli.output import share
from shira.cli.pictures import histogram, new_figure, to_draw
from shira.cli.report.gather import Curve, Described
from shira.measure import Rank

_SVG = "{http://www.w3.org/2000/svg}"
_STYLE: Any = {
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
    figures = every.figures
    names = [target.name for target in summary.targets]
    about = f"{figures.count:,} values, {figures.zeros:,} of them zero."
    yield Chart("Values", about, _histogram(*histogram(described.adapter.values(), figures.reach)))

    sizes = [target.figures.mean_absolute for target in summary.targets]
    drawing = _by_weight("mean absolute value", names, {"": sizes})
    yield Chart("Size of the deltas", "Mean absolute value in each weight.", drawing)

    if described.ranks:
        found = [described.ranks[name] for name in names]
        series = {
            "numerical rank": [float(rank.rank) for rank in found],
            "stable rank": [rank.stable_rank for rank in found],
        }
        drawing = _by_weight("rank", names, series)
        yield Chart("Rank of the deltas", _about_ranks(found), drawing, list(series))

    if every.vanishing is not None:
        told = share(every.vanishing, figures.count - figures.zeros, "deltas other than zero")
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


def _about_ranks(found: Sequence[Rank]) -> str:
    full = sum(rank.rank == rank.bound for rank in found)
    more = sum(rank.at_least for rank in found)
    return (
        f"{full} of {len(found)} weights have the highest rank that their entries allow"
        + (f"; of {more} the rank is at least what is shown" if more else "")
        + ". The stable rank says how many directions matter."
    )


def _training(curve: Curve) -> Chart:
    about = f"From {curve.file}."
    if curve.problem is not None:
        told = Markup('<p class="note">Not drawn: {}</p>').format(printable(curve.problem))
        return Chart("Training", about, told)
    if curve.every > 1:
        about += f" One of {curve.every} points is drawn."
    steps, x_label = to_draw(_numbers(curve.series, 0), "optimizer step")
    losses, y_label = to_draw(_numbers(curve.series, 1), "loss")
    figure, axes = _axes(x_label, y_label)
    titles: Titles = {}
    start = 0
    for number, points in enumerate(curve.series.values()):
        part = slice(start, start := start + len(points))
        few = len(points) <= 100
        axes.plot(steps[part], losses[part], gid=f"s{number}", marker="o" if few else None)
        titles[f"s{number}"] = [f"step {step:g}: {loss:.4g}" for step, loss in points]
    drawing = _inline(figure, "Loss over optimizer steps", titles)
    return Chart("Training", about, drawing, list(curve.series))


def _numbers(series: Mapping[str, Any], which: int) -> Any:
    return np.array([point[which] for points in series.values() for point in points])


def _histogram(counts: Any, edges: Any) -> Markup:
    """Draw how many values there are in each part of their range, on a logarithmic scale."""
    titles = [
        f"{low:.3g} to {high:.3g}: {count:,}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]
    edges, label = to_draw(edges, "value")
    figure, axes = _axes(label, "values")
    axes.set_yscale("log")
    axes.set_ylim(0.5, 1.2 * counts.max(initial=1) + 0.3)
    axes.set_xlim(edges[0], edges[-1])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(_count)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            axes.bar(low, count - 0.5, high - low, 0.5, align="edge")[0].set_gid("s0")
    return _inline(figure, "Histogram of the values", {"s0": titles})


def _count(value: float, _position: int) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _by_weight(label: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> Markup:
    """Draw a point for each weight, in the order of the weights, for each of up to two series."""
    values = np.array(list(series.values()), dtype=np.float64)
    values, y_label = to_draw(values, label)
    figure, axes = _axes("weight, in the order of the table", y_label)
    numbers = np.arange(1, len(names) + 1)
    titles: Titles = {}
    for which, (given, drawn) in enumerate(zip(series.values(), values, strict=True)):
        axes.plot(numbers, drawn, gid=f"s{which}", marker="o", linestyle="none")
        titles[f"s{which}"] = [
            f"{name}: {label} {value:.4g}" for name, value in zip(names, given, strict=True)
        ]
    axes.set_ylim(0.0, 1.05 * float(values.max(initial=0.0)) or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _inline(figure, f"{label} of each weight", titles)


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Return an empty figure of 400 x 230 units, and its axes."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = new_figure((400 / 72, 230 / 72), "shira report")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.patch.set_visible(False)
    axes.grid(axis="y", gid="grid")
    return figure, axes


def _inline(figure: Any, label: str, titles: Titles) -> Markup:
    """Return a figure as SVG without styles, links and ids, which is read aloud as ``label``."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_visible(False)
    buffer = BytesIO()
    with matplotlib.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(buffer)  # type: ignore[no-untyped-call]
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
        kind, style = element.tag.removeprefix(_SVG), element.get("style", "")
        made = ElementTree.Element(kind)
        if kind == "g":
            gid = element.get("id")
            yield from _shapes(element, gid if gid in (*titles, "grid") else name, titles)
            continue
        if kind == "text":
            anchor = re.search(r"text-anchor: (\w+)", style)
            made.set("text-anchor", anchor[1] if anchor else "start")
            given = ((key, element.get(key, "")) for key in ("x", "y", "transform"))
            for key, value in given:
                if value and "rotate(-0 " not in value:
                    made.set(key, _rounded(value))
            made.text = element.text
        elif kind == "use":  # a marker
            made = ElementTree.Element("circle", {"class": f"{name} point", "r": "3"})
            for key in ("x", "y"):
                made.set(f"c{key}", _rounded(element.get(key, "0")))
        elif kind == "path":
            made.set("d", _rounded(element.get("d", "")))
            if name in titles:
                made.set("class", f"{name} {'line' if 'fill: none' in style else 'bar'}")
            else:
                made.set("class", "grid" if name == "grid" else "axis")
        else:
            continue  # definitions and metadata
        if made.get("class", "").endswith(("point", "bar")):
            ElementTree.SubElement(made, "title").text = printable(next(titles[name]))
        yield made


def _rounded(numbers: str) -> str:
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", " ".join(numbers.split()))


def printable(text: str) -> str:
    """Return a text with U+FFFD for control characters, which HTML has not."""
    kept = "\n\t"
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)
