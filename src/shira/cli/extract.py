# SPDX-License-Identifier: Apache-2.0
"""`shira extract`: the adapter between two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira extract ./llama ./llama-merged --output adapter.safetensors   # exact",
    "shira extract ./llama ./llama-tuned --density 0.02 --output adapter.safetensors",
    "shira extract ./llama ./llama-tuned --r 32 --everywhere --output adapter --format peft",
    "shira extract ./llama ./llama-tuned --density 0.02 --include '*proj.weight' --output a.safetensors",  # noqa: E501
    "shira extract ./llama ./tuned --density 0.02 --output a.safetensors --json | jq .energy_share",
)


def command(
    base: Annotated[
        str, typer.Argument(help="The base: a checkpoint's folder or file, or a name on the hub.")
    ],
    tuned: Annotated[str, typer.Argument(help="The tuned model, likewise.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the adapter goes.")],
    density: Annotated[
        float | None, typer.Option(help="Keep at most this share of each weight's entries.")
    ] = None,
    r: Annotated[
        int | None,
        typer.Option("--r", help="Keep at most r (m + n) entries of an m x n weight, as a LoRA."),
    ] = None,
    everywhere: Annotated[
        bool,
        typer.Option(
            "--everywhere", help="Spend the budgets on the largest differences of all weights."
        ),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Look at weights of such names only, e.g. '*proj.weight'. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out weights of such names. Repeatable.")
    ] = None,
    to: Annotated[
        str, typer.Option("--format", "--to", help="compact (a file) or peft (a folder).")
    ] = "compact",
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the stored values; rarely exact unless left out."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, weight by weight, as JSON.")
    ] = False,
) -> None:
    """Find the adapter that leads from one checkpoint to another.

    Where the tuned model differs in few entries, the adapter holds them all and is exact: merged
    into the base it gives the tuned weights bit for bit. A model that was tuned in full differs
    nearly everywhere and needs a budget, --density or --r: the entries that changed most are kept,
    and what share of the squared difference they hold is printed.

    Exit status 1: without a budget, some entry could not be carried exactly.
    """
    from shira.cli.quiet import share_cores

    share_cores()
    from shira.cli._convert.progress import following
    from shira.cli._convert.saving import check_format, check_new, dtype_named, keeps_values, save
    from shira.convert import extract
    from shira.store.outputs import check_outputs

    check_outputs({"--output": output}, checkpoints=[base, tuned])
    check_format(to)
    check_new(output, overwrite)
    dtype_named(dtype)
    with following("comparing, million entries") as progress:
        told = extract(
            base,
            tuned,
            density=density,
            r=r,
            everywhere=everywhere,
            include=include or ("*",),
            exclude=exclude or (),
            progress=progress,
        )
    saved = save(told.adapter, output, to, dtype)
    exact = told.exact and keeps_values(told.adapter, dtype)
    if as_json:
        print(json.dumps({**saved, **told.as_json(), "exact": exact}, indent=2))
    else:
        from shira.cli._convert import tables

        tables.extracted(told, saved, exact)
    if density is None and r is None and not told.exact:
        raise typer.Exit(1)
