# SPDX-License-Identifier: Apache-2.0
"""`shira inspect`: what is in an adapter, and a picture of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shira.cli import options
from shira.cli.output import console, facts, print_json, print_table, write

if TYPE_CHECKING:
    from shira.cli.summary import Target

EXAMPLES = (
    "shira inspect adapter",
    "shira inspect adapter/adapter_model.safetensors --all",
    "shira inspect adapter --json | jq .density",
    "shira inspect adapter --base sentence-transformers/all-MiniLM-L6-v2",
    "shira inspect adapter --base ./my-model/model.safetensors",
    "shira inspect adapter.safetensors --plot adapter.png",
)

_FEW = 12  # targets that are listed one by one anyway
_WIDE = 150  # columns of a terminal; a narrower one gets fewer figures rather than broken words
_WIDE_ONLY = ("dtype", "min", "max", "std", "zeros")


def command(
    path: options.AdapterPath,
    base: Annotated[
        str | None,
        options.base("Tells whether it is the right one, and how many deltas bfloat16 loses."),
    ] = None,
    each: Annotated[
        bool, typer.Option("--all", help="List each weight, not like ones together.")
    ] = False,
    as_json: options.Json = False,
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
    from shira.cli import summary as summaries
    from shira.store.atomic import check_outputs

    check_outputs({"--plot": plot}, [path], [base])
    summary = summaries.summarize(path, None if base is None else open_checkpoint(base))
    if plot is not None:
        from shira.cli.pictures import plot_adapter

        plot_adapter(summary, plot, each=each)
    if as_json:
        print_json(summary.as_json())
        return
    facts(str(path), summary.lines())
    targets, title = summary.targets, "Targets"
    if not each and len(targets) > _FEW:
        title = "Targets (* is a layer's number; --all lists each weight)"
        groups: dict[tuple[str, object, str], list[Target]] = {}
        for target in targets:
            key = (summaries.without_number(target.name), target.shape, target.dtype)
            groups.setdefault(key, []).append(target)
        targets = [summaries.together(name, like) for (name, *_), like in groups.items()]
    if targets:
        cells = [target.cells() for target in targets]
        columns = [c for c in cells[0] if console().width >= _WIDE or c not in _WIDE_ONLY]
        rows = [[row[column] for column in columns] for row in cells]
        print_table(title, columns, rows, [c for c in columns if c not in summaries.TEXT_COLUMNS])
    if plot is not None:
        write(f"{plot}: where the entries are, and a histogram of the values")
