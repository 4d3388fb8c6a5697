# SPDX-License-Identifier: Apache-2.0
"""`shira inspect`: what is in an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira inspect adapter",
    "shira inspect adapter/adapter_model.safetensors --all",
    "shira inspect adapter --json | jq .density",
    "shira inspect adapter --base sentence-transformers/all-MiniLM-L6-v2",
    "shira inspect adapter --base ./my-model/model.safetensors",
    "shira inspect adapter.safetensors --plot adapter.png",
)


def command(
    path: Annotated[Path, typer.Argument(help="The adapter: a folder, or its file.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Its base model: a safetensors file, a folder with some, or a name on the hub. "
            "Tells whether it is the right one, and how many deltas bfloat16 loses."
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--all", help="List each weight, not like ones together.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, weight by weight, as JSON.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw into this PNG where in each weight the entries are, like weights of "
            "different layers together (--all: each), and a histogram of the values."
        ),
    ] = None,
) -> None:
    """Show what is in an adapter.

    Targets, shapes, entries, density, value statistics, mask and seed, fingerprint of the base.
    A delta is lost in bfloat16 when adding it changes nothing in a bfloat16 copy of the base, so
    that count needs the base.
    """
    from shira.checkpoints import open_checkpoint
    from shira.cli._inspect.summary import summarize
    from shira.store.outputs import check_outputs

    check_outputs({"--plot": plot}, [path], [base])
    checkpoint = None if base is None else open_checkpoint(base)
    summary = summarize(path, checkpoint)
    if plot is not None:
        from shira.cli._inspect.plot import plot_adapter

        plot_adapter(summary, plot, each=each)
    if as_json:
        print(json.dumps(summary.as_json(), indent=2))
        return

    from shira.cli._inspect import tables
    from shira.cli.output import console, write

    out = console()
    out.print(tables.whole(summary))
    out.print(tables.targets(summary, each=each, width=out.width))
    if plot is not None:
        write(f"{plot}: where the entries are, and a histogram of the values")
