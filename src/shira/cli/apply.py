# SPDX-License-Identifier: Apache-2.0
"""`shira apply`: links of a chain on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.progress import Steps

EXAMPLES = (
    "shira apply ./step-0 step-1.safetensors --output ./step-1",
    "shira apply ./step-0 step-*.safetensors --output ./latest   # skips those in it",
    "shira apply ./model step-1.safetensors --in-place",
)


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint of the chain: a folder, a file, or a name.")
    ],
    links: Annotated[
        list[Path],
        typer.Argument(help="Links, in order: what 'shira diff' wrote.", metavar="LINK..."),
    ],
    output: Annotated[
        Path | None, options.output("Where the new checkpoint goes: a folder (or a file).")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Put it in the place of the old one.")
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Make the checkpoint that links lead to, the same files bit for bit.

    The checkpoint may be any of the chain: links that it has in it already are skipped. It is held
    against the links' hash, and the result too, before it appears, as a whole: who looks, or kills
    the process, finds the old one or the new one. Memory is that of a few pieces of a tensor.

    Exit status 2: the checkpoint is none of the chain, or differs in a bit, a link is damaged, or
    the output exists; nothing is changed.
    """
    out.share_cores()
    from shira.chain import apply

    with Steps("applying, MB", unit=10**6) as steps:
        told = apply(
            checkpoint,
            links,
            output,
            in_place=in_place,
            overwrite=overwrite,
            progress=steps.tell,
        )
    if as_json:
        out.print_json(told.as_json())
        return
    skipped = f", {told.skipped} were in it already" if told.skipped else ""
    lines = {
        "output": f"{told.output}, {out.megabytes(told.size)} in {len(told.files)} files",
        "checkpoint": told.hash,
        "links": f"{told.applied} applied{skipped}",
        "changed": f"{len(told.changed)} tensors",
    }
    out.facts("Applied", lines.items())
