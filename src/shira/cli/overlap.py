# SPDX-License-Identifier: Apache-2.0
"""`shira overlap`: what adapters have in common, and how much they get in each other's way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
            help="What the matrix and the picture of several adapters show: jaccard, shared, "
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
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, for adapters that do not record the shapes of its weights, as "
            "those that PEFT itself has written: a safetensors file, a folder with some, or a name "
            "on the hub."
        ),
    ] = None,
    check_base: Annotated[
        bool,
        typer.Option(
            "--check-base/--no-check-base", help="Refuse adapters of different base models."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of estimates that draw.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, weight by weight, as JSON.")
    ] = False,
) -> None:
    """Show how adapters overlap, pair by pair.

    jaccard: shared entries over entries of either. conflicts: shared entries whose signs differ.
    cosine: of the angle between the two. With A and B the deltas of a weight, AWOM is the spectral
    norm of A^T B, and AWOR the share of its entries that are zero: the paper's measures of how
    little two adapters interfere; +- is the error of an estimate.

    Exit status 2: an adapter cannot be read, or the adapters do not belong together.
    """
    from shira.cli._fuse import pairs as pairwise
    from shira.cli._fuse.adapters import read_all, short_names
    from shira.errors import ConfigError
    from shira.store.outputs import check_outputs

    check_outputs({"--plot": plot}, adapters, [base])
    pairwise.check_figure(figure)
    if len(adapters) < 2 and not rank:
        raise ConfigError("an overlap is of two adapters or more; --rank looks at one")
    if plot is not None and len(adapters) < 2:
        raise ConfigError("--plot draws the pairs of two adapters or more")
    if fast and figure in ("awom", "awor"):
        raise ConfigError(f"--fast leaves out what --figure {figure} asks for")
    names = short_names(adapters)
    read = read_all(adapters, base)
    found = pairwise.all_pairs(read, names, interference=not fast, seed=seed, check_base=check_base)
    ranks = pairwise.ranks(read, names, seed=seed) if rank else []
    if plot is not None:
        from shira.cli._fuse.plot import plot_matrix

        plot_matrix(names, found, figure, plot)
    if as_json:
        made: dict[str, object] = {
            "adapters": [
                {"name": name, "path": path, "nnz": adapter.nnz, "density": adapter.density}
                for name, path, adapter in zip(names, adapters, read, strict=True)
            ],
            "pairs": [pair.as_json() for pair in found],
        }
        if rank:
            made["ranks"] = [
                {"adapter": of, "parameter": parameter, **value.as_json()}
                for of, parameter, value in ranks
            ]
        print(json.dumps(made, indent=2))
        return

    from shira.cli._fuse import tables
    from shira.cli.output import console, write

    out = console()
    if found:
        out.print(tables.pairs(found))
    if any(pair.whole for pair in found):
        out.print(tables.whole_tensors(found))
    if len(names) > 2:
        out.print(tables.matrix(names, found, figure))
    if each or len(found) == 1:
        for pair in found:
            out.print(tables.parameters(pair, each=each))
    if rank:
        out.print(tables.ranks(ranks))
    if plot is not None:
        write(f"{plot}: the {figure} of all pairs")
