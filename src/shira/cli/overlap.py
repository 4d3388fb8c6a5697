# SPDX-License-Identifier: Apache-2.0
"""`shira overlap`: what adapters have in common, and how much they get in each other's way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shira.cli import options
from shira.errors import ConfigError, shown

if TYPE_CHECKING:
    from shira.measure import Overlap, Rank

EXAMPLES = (
    "shira overlap poems code",
    "shira overlap poems code --all",
    "shira overlap poems code law --plot overlap.png",
    "shira overlap poems code law --figure cosine --plot cosine.png",
    "shira overlap poems code --json | jq .pairs[0].jaccard",
    "shira overlap poems --rank",
)


def command(
    adapters: Annotated[
        list[str], typer.Argument(help="The adapters: folders or files.", metavar="ADAPTER")
    ],
    figure: Annotated[
        str,
        typer.Option(
            help="The figure in the matrix and the picture of several adapters: jaccard, shared, "
            "conflicts, cosine, awom or awor."
        ),
    ] = "jaccard",
    plot: Annotated[
        Path | None, typer.Option(help="Draw the matrix of all pairs into this PNG.")
    ] = None,
    each: Annotated[bool, typer.Option("--all", help="List each weight of each pair.")] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Leave out AWOM and AWOR, which take the longer time.")
    ] = False,
    rank: Annotated[
        bool,
        typer.Option("--rank", help="Show the numerical rank of each delta; one adapter will do."),
    ] = False,
    base: options.BaseForShapes = None,
    check_base: options.CheckSameBase = True,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Show how adapters overlap, pair by pair.

    jaccard: shared entries over entries of either. conflicts: shared entries whose signs differ.
    cosine: of the angle between the two. With A and B the deltas of a weight, AWOM is the spectral
    norm of A^T B, and AWOR the share of its entries that are zero: the paper's measures of how
    little two adapters interfere; +- is the error of an estimate.

    Exit status 2: an adapter cannot be read, or the adapters do not belong together.
    """
    from shira.cli.output import print_json, write
    from shira.cli.several import FIGURES, all_pairs, ranks, read_all, short_names
    from shira.store.atomic import check_outputs

    check_outputs({"--plot": plot}, adapters, [base])
    options.one_of("--figure", figure, FIGURES)
    if len(adapters) < 2 and not rank:
        raise ConfigError("an overlap is of two adapters or more; --rank looks at one")
    if plot is not None and len(adapters) < 2:
        raise ConfigError("--plot draws the pairs of two adapters or more")
    if fast and figure in ("awom", "awor"):
        raise ConfigError(f"--fast leaves out what --figure {figure} asks for")
    names = short_names(adapters)
    read = read_all(adapters, base)
    pairs = all_pairs(read, names, interference=not fast, seed=seed, check_base=check_base)
    found_ranks = ranks(read, names, seed=seed) if rank else []
    if plot is not None:
        plot_matrix(names, pairs, figure, plot)
    if not as_json:
        _show(names, pairs, figure, each=each)
        if rank:
            _show_ranks(found_ranks)
        if plot is not None:
            write(f"{plot}: the {figure} of all pairs")
        return
    made: dict[str, object] = {
        "adapters": [
            {"name": name, "path": path, "nnz": adapter.nnz, "density": adapter.density}
            for name, path, adapter in zip(names, adapters, read, strict=True)
        ],
        "pairs": [pair.as_json() for pair in pairs],
    }
    if rank:
        made["ranks"] = [
            {"adapter": of, "parameter": parameter, **value.as_json()}
            for of, parameter, value in found_ranks
        ]
    print_json(made)


def _show(names: Sequence[str], pairs: Sequence[Overlap], figure: str, *, each: bool) -> None:
    from shira.cli.output import MANY, console, table
    from shira.cli.several import matrix
    from shira.measure.figures import FIGURE_NAMES, cells

    out = console()
    if pairs:
        result = table("Pairs", "a", "b", *FIGURE_NAMES, right=FIGURE_NAMES)
        for pair in pairs:
            result.add_row(pair.a, pair.b, *cells(pair))
        out.print(result)
    if any(pair.whole for pair in pairs):
        result = table("Whole tensors", "a", "b", "tensor", "")
        for pair in pairs:
            for name, state in pair.whole.items():
                result.add_row(pair.a, pair.b, name, state)
        out.print(result)
    if len(names) > 2:
        result = table(f"{figure} of all pairs", "", *names, right=names)
        for name, row in zip(names, matrix(names, pairs, figure), strict=True):
            result.add_row(name, *("-" if value is None else f"{value:.4g}" for value in row))
        out.print(result)
    numbers = (*FIGURE_NAMES, "AWOR if random")
    for pair in pairs if each or len(pairs) == 1 else ():
        shown = pair.parameters if each else pair.parameters[:MANY]
        more = len(pair.parameters) - len(shown)
        title = f"{pair.a} and {pair.b}, weight by weight"
        title += f" ({more} more with --all)" if more else ""
        result = table(title, "weight", *numbers, right=numbers)
        for parameter in shown:
            result.add_row(parameter.name, *cells(parameter), f"{parameter.awor_of_random:.4g}")
        out.print(result)


def _show_ranks(found: Sequence[tuple[str, str, Rank]]) -> None:
    from shira.cli.output import console, table

    numbers = ("rank", "at most", "stable rank", "spectral norm")
    result = table("Numerical ranks", "adapter", "weight", *numbers, right=numbers)
    for adapter, parameter, rank in found:
        sign = ">= " if rank.at_least else "" if rank.exact else "~ "
        stable, norm = f"{rank.stable_rank:.1f}", str(rank.spectral_norm)
        result.add_row(adapter, parameter, f"{sign}{rank.rank}", str(rank.bound), stable, norm)
    console().print(result)


def plot_matrix(names: Sequence[str], pairs: Sequence[Overlap], figure: str, path: Path) -> None:
    """Draw one of `shira.cli.several.FIGURES` of all pairs as a PNG; the diagonal stays empty."""
    from shira.cli.pictures import new_drawing, write_drawing
    from shira.cli.several import matrix

    values = matrix(names, pairs, figure)
    known = [value for row in values for value in row if value is not None]
    signed = figure == "cosine"
    # AWOM may be beyond float64, and colours are of what is not
    reach = max((abs(value) for value in known if math.isfinite(value)), default=0.0) or 1.0
    shares = [
        [math.nan if value is None else max(min(value / reach, 1.0), -1.0) for value in row]
        for row in values
    ]
    side = max(3.6, 0.9 * len(names) + 1.8)
    drawing = new_drawing((side + 0.8, side), "--plot", path)
    axes = drawing.add_subplot(title=f"{figure} of all pairs")
    colours = {"cmap": "RdBu_r" if signed else "viridis", "vmin": -1.0 if signed else 0.0}
    image = axes.imshow(shares, vmax=1.0, **colours)
    labels = [shown(name)[:60] for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                dark = abs(shares[i][j]) > 0.6 if signed else shares[i][j] < 0.6
                colour = "white" if dark else "black"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour)
    drawing.colorbar(
        image, ax=axes, shrink=0.8, format=lambda share, _position: f"{share * reach:.3g}"
    )
    write_drawing(drawing, path)
