# SPDX-License-Identifier: Apache-2.0
"""`shira verify`: links of a chain, and where in it a checkpoint stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.progress import Steps
from shira.errors import listed

EXAMPLES = (
    "shira verify step-*.safetensors",
    "shira verify step-*.safetensors --checkpoint ./model   # how many of them it has in it",
    "shira verify step-*.safetensors --checkpoint ./model --json | jq .applied",
)


def command(
    links: Annotated[
        list[Path],
        typer.Argument(help="Links, in order: what 'shira diff' wrote.", metavar="LINK..."),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A checkpoint to find in the chain: a folder, a file, a name."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check links of a chain, and that each stands on the one before.

    A checkpoint is found in the chain by every bit of its tensors.

    Exit status 2: a link is damaged or out of order, or the checkpoint is none of the chain; it is
    said which tensors differ.
    """
    out.share_cores()
    from shira.chain import verify

    with Steps("reading, MB", unit=10**6) as steps:
        told = verify(links, checkpoint, progress=steps.tell)
    if as_json:
        out.print_json(told.as_json())
        return
    lines = {
        "links": f"{told.links}, sound and in order",
        "from checkpoint": told.old,
        "to checkpoint": told.new,
    }
    if told.applied is not None:
        lines["checkpoint"] = f"{checkpoint} has {told.applied} of them in it"
    if told.other_files:
        lines["other files"] = f"not what the links say: {listed(told.other_files)}"
    out.facts("Verified", lines.items())
