# SPDX-License-Identifier: Apache-2.0
"""`shira unmerge`: from a merged checkpoint back to the base's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira merge adapter --base ./llama --output ./merged --undo ./merged.undo",
    "shira unmerge ./merged --undo ./merged.undo --output ./llama-again",
    "sha256sum llama/*.safetensors llama-again/*.safetensors   # the same",
)


def command(
    merged: Annotated[
        Path, typer.Argument(help="The merged checkpoint, in the files that 'shira merge' wrote.")
    ],
    undo: Annotated[Path, typer.Option(help="The undo file that it wrote.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where the restored checkpoint goes: a folder (or a file)."
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Take a merged adapter out of a checkpoint: the base's own bytes again.

    The merged checkpoint is copied and the originals are put back in the copy. An undo file of
    another merge, or a checkpoint that has changed since, is refused.

    Exit status 2: it was refused, or the output exists; nothing is written.
    """
    from shira.cli.quiet import share_cores

    share_cores()
    from shira.cli._convert.progress import following
    from shira.convert import unmerge

    with following("unmerging, MB") as progress:
        told = unmerge(merged, undo, output, overwrite=overwrite, progress=progress)
    if as_json:
        print(json.dumps(told.as_json(), indent=2))
        return
    from shira.cli._convert import tables

    tables.unmerged(told)
