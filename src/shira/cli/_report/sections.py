# SPDX-License-Identifier: Apache-2.0
"""The parts of the page, in the order in which they stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from shira.cli._report.charts import by_weight, curves, value_histogram
from shira.cli._report.curve import Curve
from shira.cli._report.gather import Described, Report
from shira.cli._report.html import Child, Html, joined, tag
from shira.cli.pictures import histogram
from shira.cli.several import FIGURES
from shira.cli.summary import Target
from shira.measure import Overlap, Rank
from shira.measure.figures import FIGURE_NAMES, cells

MATRICES = ("jaccard", "cosine", "conflicts")
_MEANING = {
    "jaccard": "shared entries over entries of either",
    "cosine": "of the angle between the two",
    "conflicts": "share of the shared entries whose signs differ",
}


def adapter_section(described: Described, first_map: int) -> Html:
    """All of one adapter; its maps are numbered from ``first_map`` on."""
    return tag(
        "section",
        tag("h2", described.name),
        tag("p", tag("code", str(described.summary.path))),
        _summary(described),
        tag("div", list(_charts(described)), class_="charts"),
        _maps(described, first_map),
        _targets(described),
    )


def pairs_section(report: Report) -> Html | None:
    """How the adapters overlap; None if there is one only."""
    if not report.pairs:
        return None
    names = [described.name for described in report.adapters]
    rows = ([tag("th", pair.a), tag("th", pair.b), _cells(cells(pair))] for pair in report.pairs)
    return tag(
        "section",
        tag("h2", "Overlap"),
        tag("div", [_matrix(names, report.pairs, name) for name in MATRICES], class_="charts"),
        _table(("a", "b", *FIGURE_NAMES), rows, text=2),
        tag(
            "p",
            "With A and B the deltas of a weight, AWOM is the spectral norm of A",
            tag("sup", "T"),
            "B, and AWOR the share of its entries that are zero. +- is the error of an estimate, "
            "- what was left out.",
            class_="note",
        ),
    )


def _summary(described: Described) -> Html:
    rows = (
        tag("tr", tag("th", name), tag("td", value)) for name, value in described.summary.lines()
    )
    return tag("table", tag("tbody", rows), class_="facts")


def _charts(described: Described) -> Iterator[Html]:
    summary = described.summary
    every = summary.all.figures
    names = [target.name for target in summary.targets]
    yield _figure(
        "Values",
        f"{every.count:,} values, {every.zeros:,} of them zero.",
        value_histogram(*histogram(described.adapter.values(), every.reach)),
    )
    sizes = [target.figures.summary()["mean_abs"] or 0.0 for target in summary.targets]
    yield _figure(
        "Size of the deltas",
        "Mean absolute value in each weight.",
        by_weight("Mean absolute value in each weight", "mean absolute value", names, all=sizes),
    )
    if described.ranks:
        found = [described.ranks[name] for name in names]
        yield _figure(
            "Rank of the deltas",
            _about_ranks(found),
            by_weight(
                "Numerical rank and stable rank of each weight",
                "rank",
                names,
                numerical_rank=[rank.rank for rank in found],
                stable_rank=[rank.stable_rank for rank in found],
            ),
        )
    if summary.all.vanishing is not None:
        shares = [_lost_share(target) for target in summary.targets]
        yield _figure(
            "Lost to rounding",
            f"{summary.all.vanishing:,} of {every.count - every.zeros:,} deltas other than zero "
            "change nothing in a bfloat16 copy of the base.",
            by_weight("Share of deltas lost in bfloat16", "% lost in bf16", names, all=shares),
        )
    if described.curve is not None:
        yield _curve(described.curve)


def _about_ranks(found: Sequence[Rank]) -> str:
    full = sum(rank.rank == rank.bound for rank in found)
    more = sum(rank.at_least for rank in found)
    return (
        f"{full} of {len(found)} weights have the highest rank that their entries allow"
        + (f"; of {more} the rank is at least what is shown" if more else "")
        + ". The stable rank says how many directions matter."
    )


def _curve(curve: Curve) -> Html:
    about = f"From {curve.file}."
    if curve.problem is not None:
        return _figure("Training", about, tag("p", f"Not drawn: {curve.problem}", class_="note"))
    if curve.every > 1:
        about += f" One of {curve.every} points is drawn."
    return _figure("Training", about, curves(curve.series))


def _maps(described: Described, first: int) -> Html:
    buttons = (
        tag(
            "button",
            tag("canvas", width=1, height=1),
            tag("span", _breakable(made.name)),
            type="button",
            class_="map",
            data_map=number,
        )
        for number, made in enumerate(described.maps, first)
    )
    return tag(
        "div",
        tag("h3", "Where the entries are"),
        tag(
            "p",
            "Share of each part of the weight that is trained, rows downwards. Choose one to zoom "
            "in. Each has a scale of its own, from none to the largest share in it.",
            class_="note",
        ),
        tag("noscript", tag("p", "The maps need JavaScript; this page holds all of it.")),
        tag("div", buttons, class_="maps"),
    )


def _targets(described: Described) -> Html:
    columns: list[tuple[str, Callable[[Target], Child]]] = [
        ("shape", lambda target: " x ".join(map(str, target.shape or "?"))),
        ("k", lambda target: f"{target.nnz:,}"),
        ("density", lambda target: "?" if target.density is None else f"{target.density:.2%}"),
        ("dtype", lambda target: target.dtype),
        *((name, _value(name)) for name in ("min", "max", "mean_abs", "std")),
        ("zeros", lambda target: f"{target.figures.zeros:,}"),
    ]
    ranks = described.ranks
    if ranks:
        columns += [
            ("rank", lambda target: str(ranks[target.name])),
            ("stable rank", lambda target: f"{ranks[target.name].stable_rank:.1f}"),
        ]
    if described.summary.all.vanishing is not None:
        columns.append(("lost in bf16", lambda target: f"{target.vanishing:,}"))
    rows = (
        [tag("th", number), tag("th", target.name), _cells([show(target) for _, show in columns])]
        for number, target in enumerate(described.summary.targets, 1)
    )
    heads = [name.replace("mean_abs", "mean abs") for name, _ in columns]
    return tag("div", tag("h3", "Weights"), _table(("", "weight", *heads), rows, text=2))


def _matrix(names: Sequence[str], pairs: Sequence[Overlap], figure: str) -> Html:
    values = {frozenset((pair.a, pair.b)): FIGURES[figure](pair) for pair in pairs}
    reach = max(map(abs, values.values())) or 1.0

    def cell(name: str, other: str) -> Html:
        if name == other:
            return tag("td", "-")
        value = values[frozenset((name, other))]
        colour = "s1" if value < 0 else "s0"
        style = f"--share:{abs(value) / reach * 60:.0f}%"
        return tag("td", f"{value:.4g}", class_=f"shade {colour}", style=style)

    rows = ([tag("th", name), [cell(name, other) for other in names]] for name in names)
    return _figure(figure, f"{_MEANING[figure]}.", _table(("", *names), rows))


def _figure(title: str, about: str, drawn: Html) -> Html:
    return tag("figure", tag("h3", title), drawn, tag("figcaption", about))


def _table(heads: Sequence[str], rows: Iterator[Child], text: int = 1) -> Html:
    """A table that scrolls inside its own frame; its first ``text`` columns hold words."""
    head = tag(
        "tr", [tag("th", name, class_=number >= text and "n") for number, name in enumerate(heads)]
    )
    body = tag("tbody", (tag("tr", row) for row in rows))
    return tag("div", tag("table", tag("thead", head), body), class_="scroll", tabindex=0)


def _cells(values: Sequence[Child]) -> Html:
    return joined(tag("td", value) for value in values)


def _value(name: str) -> Callable[[Target], Child]:
    def show(target: Target) -> Child:
        value = target.figures.summary()[name]
        return "-" if value is None else f"{value:.3g}"

    return show


def _breakable(name: str) -> list[Child]:
    """A long name that may break after its points."""
    return [(part, tag("wbr")) for part in re.split(r"(?<=\.)", name)]


def _lost_share(target: Target) -> float:
    changed = target.nnz - target.figures.zeros
    return 100 * (target.vanishing or 0) / changed if changed else 0.0
