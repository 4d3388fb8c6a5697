# SPDX-License-Identifier: Apache-2.0
"""The page of a report, and its charts: matplotlib's SVG, which stands inside the page.

The page's style sheet colours them, for a light and a dark page: marks have the classes ``s0`` and
``s1`` with ``bar``, ``line`` or ``point``, and a text that is shown where one points at them.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from shira._version import __version__
from shira.cli.output import megabytes, of_deltas, percent
from shira.cli.pictures import axis_unit, histogram
from shira.cli.report.gather import Curve, Described
from shira.cli.several import matrix
from shira.cli.summary import BASE_FIELD
from shira.errors import listed, shown
from shira.measure import Overlap
from shira.measure.figures import FIGURE_NAMES, cells

_STYLED = matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11})  # text stays text
_MATRICES = {
    "jaccard": "Shared entries over entries of either: 0 is none in common, 1 the same entries.",
    "cosine": "Of the angle between the deltas: 0 is unrelated, 1 the same way, -1 the opposite.",
    "conflicts": "Share of the shared entries whose signs differ, so that one undoes the other.",
}
ENVIRONMENT = Environment(
    loader=PackageLoader("shira.cli", "report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=lambda value: value if isinstance(value, Markup) else shown(value, lines=True),
)
"""Of templates in which every text is shown as it is and escaped."""


def page(adapters: Sequence[Described], pairs: Sequence[Overlap]) -> str:
    """Return the HTML document; the same adapters give the same text."""
    names = [described.name for described in adapters]
    ENVIRONMENT.filters["sha256"] = lambda text: b64encode(sha256(text.encode()).digest()).decode()
    return ENVIRONMENT.get_template("page.html").render(
        adapters=adapters,
        pairs=pairs,
        names=names,
        in_short=_in_short,
        charts=charts,
        weights=_weights,
        cells=cells,
        figure_names=list(FIGURE_NAMES),
        matrices={figure: matrix(names, pairs, figure) for figure in _MATRICES},
        about=_MATRICES,
        maps=[made for described in adapters for made in described.maps],
        version=__version__,
    )


def _in_short(described: Described, pairs: Sequence[Overlap]) -> Iterator[tuple[str, str]]:
    """Yield what a person wants to know first: question and answer."""
    summary, every = described.summary, described.summary.all
    base = summary.metadata.get(BASE_FIELD)
    kind = f"A sparse adapter of {base}" if base else "A sparse adapter; its base is not recorded"
    yield "What is it?", f"{kind}. Mask: {summary.mask}."
    size = f"{every.nnz:,} entries in {len(summary.targets)} weights"
    if summary.density is not None:
        size += f", {summary.density:.2%} of these weights"
    yield "How large is it?", f"{size}; {megabytes(summary.file_bytes)} on disk."
    change = "No single entries."
    if every.nnz:
        figures, zeros = every.figures, every.figures.zeros
        most = max(-(figures.min or 0.0), figures.max or 0.0)
        change = f"Its entries by {figures.mean_abs:.3g} on average, at most {most:.3g}"
        strongest = max(summary.targets, key=lambda target: target.figures.mean_abs or 0.0)
        change += f", most in {strongest.name}" if len(summary.targets) > 1 else ""
        change += f"; {zeros:,} entries stay as they are" if zeros else ""
        change += ". All other entries of the model are the base's."
    if summary.whole:
        change += f" It also replaces {len(summary.whole)} tensors as a whole."
    yield "What does it change?", change
    for pair in pairs:
        if described.name not in (pair.a, pair.b):
            continue
        other, mine = (pair.b, pair.nnz_a) if pair.a == described.name else (pair.a, pair.nnz_b)
        unlike = [name for name, state in pair.whole.items() if state == "different"]
        clash = f"Not with {other}: they share no entry."
        if pair.shared:
            clash = (
                f"With {other} it shares {pair.shared:,} entries, {percent(pair.shared, mine)} of "
                f"its own; at {pair.sign_conflicts:,} of them the signs differ."
            )
        elif unlike:
            clash = f"With {other} it shares no entry."
        if unlike:
            clash += f" Each replaces {listed(unlike)} by a tensor of its own."
        yield "Does it clash?", clash


def _weights(described: Described) -> list[dict[str, str]]:
    """Return a row of the table for each weight, by column."""
    rows = []
    for target in described.summary.targets:
        row = target.cells()
        del row["weights"]
        if target.vanishing is None:
            del row["lost in bf16"]
        if described.ranks:
            rank = described.ranks[target.name]
            row |= {"rank": str(rank), "stable rank": f"{rank.stable_rank:.1f}"}
        rows.append(row)
    return rows


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
    about = "Mean absolute value in each weight."
    yield _by_weight("Size of the deltas", about, names, {"mean absolute value": sizes})

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
        about += ". The stable rank says how many directions matter."
        yield _by_weight("Rank of the deltas", about, names, series)
    if every.vanishing is not None:
        told = of_deltas(every.vanishing, every.nnz - every.figures.zeros)
        lost = [
            100 * (target.vanishing or 0) / max(target.nnz - target.figures.zeros, 1)
            for target in summary.targets
        ]
        about = f"{told} change nothing in a bfloat16 copy of the base."
        yield _by_weight("Lost to rounding", about, names, {"% lost in bf16": lost})
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
    titles: dict[str, list[str]] = {}
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
def _by_weight(
    title: str, about: str, names: Sequence[str], series: Mapping[str, Sequence[float]]
) -> Chart:
    """Draw a point for each weight, in the order of the weights, for each of up to two series."""
    values = np.array(list(series.values()), dtype=np.float64)
    unit, y_label = axis_unit(values, ", ".join(series))
    figure, axes = _axes("weight, in the order of the table", y_label)
    titles: dict[str, list[str]] = {}
    for which, (label, row) in enumerate(zip(series, values, strict=True)):
        gid = f"s{which}"
        axes.plot(range(1, len(names) + 1), row / unit, gid=gid, marker="o", linestyle="none")
        told = zip(names, row, strict=True)
        titles[gid] = [f"{name}: {label} {value:.4g}" for name, value in told]
    axes.set_ylim(0.0, 1.05 * float((values / unit).max(initial=0.0)) or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return Chart(title, about, _inline(figure, f"{title}, weight by weight", titles), list(series))


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Return an empty figure of 400 x 230 units, and its axes."""
    figure = Figure(figsize=(400 / 72, 230 / 72), layout="constrained")
    axes: Any = figure.add_subplot(xlabel=x_label, ylabel=y_label, axisbelow=True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", gid="grid")
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _inline(figure: Figure, label: str, titles: dict[str, list[str]]) -> Markup:
    """Return a figure as SVG without styles, links and ids, which is read aloud as ``label``.

    ``titles`` are the texts of the marks of each series, by the ``gid`` of their artists.
    """
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
