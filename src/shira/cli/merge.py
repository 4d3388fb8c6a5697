# SPDX-License-Identifier: Apache-2.0
"""`shira merge`: an adapter into a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira merge adapter --base ./llama --output ./llama-merged",
    "shira merge adapter --base ./llama --output ./llama-merged --undo ./merged.undo",
    "shira merge adapter --base ./llama --output ./half --scale 0.5 --overwrite",
    "shira merge adapter --base org/model --output ./merged   # a model of the hub's cache",
    "shira merge adapter --base ./llama --output ./merged --json | jq .lost_to_rounding",
    "shira merge adapter --base ./llama --output ./merged --max-lost 0.2   # else status 2",
)


def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter: a folder, or its file.")],
    base: Annotated[
        str,
        typer.Option(
            help="The base model: a folder with a safetensors checkpoint in one or more files, one "
            "file, or a name on the hub."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where the merged checkpoint goes: a folder (a file for a file)."
        ),
    ],
    scale: Annotated[float, typer.Option(help="Factor on the deltas.")] = 1.0,
    undo: Annotated[
        Path | None,
        typer.Option(help="Write there what 'shira unmerge' needs to restore the base's bytes."),
    ] = None,
    max_lost: Annotated[
        float,
        typer.Option(
            help="Refuse to merge if rounding swallows more than this share of the deltas."
        ),
    ] = 1.0,
    check_base: Annotated[
        bool,
        typer.Option(
            "--check-base/--no-check-base",
            help="Refuse a base without the values that the adapter was trained on.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, weight by weight, as JSON.")
    ] = False,
) -> None:
    """Merge an adapter into a checkpoint on disk.

    The folder is copied, with config, tokenizer and index, and the adapter's entries are
    overwritten in the copy: memory is that of the adapter, and the result has the bits of a model
    that was loaded, merged and saved. The output appears as a whole or not at all. Deltas too small
    for the checkpoint's dtype are lost to rounding; they are counted.

    Exit status 2: the base is another one, quantized or tied, too many deltas are lost, or the
    output exists; nothing is written.
    """
    from shira.cli.quiet import share_cores

    share_cores()
    from shira.cli._convert.progress import following
    from shira.convert import merge

    with following("merging, MB") as progress:
        told = merge(
            adapter,
            base,
            output,
            scale=scale,
            undo=undo,
            max_lost=max_lost,
            check_base=check_base,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print(json.dumps(told.as_json(), indent=2))
        return
    from shira.cli._convert import tables

    tables.merged(told)
