# SPDX-License-Identifier: Apache-2.0
"""`shira unmerge`: from a merged checkpoint back to the base's bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli.merge import written_files
from shira.cli.output import facts, print_json, share_cores
from shira.cli.progress import Steps

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
        Path, options.output("Where the restored checkpoint goes: a folder (or a file).")
    ],
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Take a merged adapter out of a checkpoint: the base's own bytes again.

    The merged checkpoint is copied and the originals are put back in the copy. An undo file of
    another merge, or a checkpoint that has changed since, is refused.

    Exit status 2: it was refused, or the output exists; nothing is written.
    """
    share_cores()
    from shira.convert import unmerge

    with Steps("unmerging, MB", unit=10**6) as steps:
        told = unmerge(merged, undo, output, overwrite=overwrite, progress=steps.tell)
    if as_json:
        print_json(told.as_json())
    else:
        back = f"{told.entries:,} entries in {told.tensors} weights"
        facts("Unmerged", [*written_files(told).items(), ("put back", back)])
