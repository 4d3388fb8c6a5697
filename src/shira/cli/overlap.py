# SPDX-License-Identifier: Apache-2.0
"""`shira overlap`: what adapters have in common, and how much they get in each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shira.cli import options
from shira.cli.output import MANY, print_json, print_table, write
from shira.errors import ConfigError, shown

if TYPE_CHECKING:
    from shira.measure import Overlap

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
    measured = ranks(read, names, seed=seed) if rank else {}
    found_ranks = [(name, *item) for name, by in measured.items() for item in by.items()]
    if plot is not None:
        plot_matrix(names, pairs, figure, plot)
    if as_json:
        told: dict[str, object] = {
            "adapters": [
                {"name": name, "path": path, "nnz": adapter.nnz, "density": adapter.density}
                for name, path, adapter in zip(names, adapters, read, strict=True)
            ],
            "pairs": [pair.as_json() for pair in pairs],
        }
        if rank:
            told["ranks"] = [
                {"adapter": of, "parameter": parameter, **value.as_json()}
                for of, parameter, value in found_ranks
            ]
        print_json(told)
        return
    _show(names, pairs, figure, each=each)
    if rank:
        numbers = ("rank", "at most", "stable rank", "spectral norm")
        rows = []
        for of, parameter, value in found_ranks:
            sign = ">= " if value.at_least else "" if value.exact else "~ "
            known = (f"{sign}{value.rank}", value.bound, f"{value.stable_rank:.1f}")
            rows.append((of, parameter, *known, value.spectral_norm))
        print_table("Numerical ranks", ("adapter", "weight", *numbers), rows, numbers)
    if plot is not None:
        write(f"{plot}: the {figure} of all pairs")


def _show(names: Sequence[str], pairs: Sequence[Overlap], figure: str, *, each: bool) -> None:
    from shira.cli.several import matrix
    from shira.measure.figures import FIGURE_NAMES, cells

    if pairs:
        rows = [(pair.a, pair.b, *cells(pair)) for pair in pairs]
        print_table("Pairs", ("a", "b", *FIGURE_NAMES), rows, FIGURE_NAMES)
    whole = [(pair.a, pair.b, *state) for pair in pairs for state in pair.whole.items()]
    if whole:
        print_table("Whole tensors", ("a", "b", "tensor", ""), whole)
    if len(names) > 2:
        found = zip(names, matrix(names, pairs, figure), strict=True)
        rows = [(name, *("-" if v is None else f"{v:.4g}" for v in row)) for name, row in found]
        print_table(f"{figure} of all pairs", ("", *names), rows, names)
    numbers = (*FIGURE_NAMES, "AWOR if random")
    for pair in pairs if each or len(pairs) == 1 else ():
        shown = pair.parameters if each else pair.parameters[:MANY]
        more = len(pair.parameters) - len(shown)
        title = f"{pair.a} and {pair.b}, weight by weight"
        title += f" ({more} more with --all)" if more else ""
        rows = [(p.name, *cells(p), f"{p.awor_of_random:.4g}") for p in shown]
        print_table(title, ("weight", *numbers), rows, numbers)


def plot_matrix(names: Sequence[str], pairs: Sequence[Overlap], figure: str, path: Path) -> None:
    """Draw one of `shira.cli.several.FIGURES` of all pairs as a PNG; the diagonal stays empty."""
    import numpy as np

    from shira.cli.pictures import new_drawing, write_drawing
    from shira.cli.several import matrix

    values = np.array(matrix(names, pairs, figure), dtype=np.float64)  # None is NaN
    reach = np.abs(values[np.isfinite(values)]).max(initial=0.0) or 1.0
    shares = (values / reach).clip(-1.0, 1.0)  # AWOM may be beyond float64
    signed = figure == "cosine"
    side = max(3.6, 0.9 * len(names) + 1.8)
    drawing = new_drawing((side + 0.8, side), "--plot", path)
    axes = drawing.add_subplot(title=f"{figure} of all pairs")
    colours = {"cmap": "RdBu_r" if signed else "viridis", "vmin": -1.0 if signed else 0.0}
    image = axes.imshow(shares, vmax=1.0, **colours)
    labels = [shown(name)[:60] for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    for (i, j), share in np.ndenumerate(shares):
        if i != j:
            dark = abs(share) > 0.6 if signed else share < 0.6
            text = f"{values[i, j]:.3g}"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    drawing.colorbar(
        image, ax=axes, shrink=0.8, format=lambda share, _position: f"{share * reach:.3g}"
    )
    write_drawing(drawing, path)
