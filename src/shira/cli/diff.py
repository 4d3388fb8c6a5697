# SPDX-License-Identifier: Apache-2.0
"""`shira diff`: what changed from one checkpoint to the next, as a link of a chain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.progress import Steps
from shira.errors import listed

EXAMPLES = (
    "shira diff ./step-0 ./step-1 --output step-1.safetensors",
    "shira diff org/model ./fine-tuned --output fine-tuned.safetensors   # one of the hub's cache",
    "shira diff ./step-0 ./step-1 -o step-1.safetensors --json | jq .changed",
)


def command(
    old: Annotated[str, typer.Argument(help="The checkpoint before: a folder, a file, or a name.")],
    new: Annotated[str, typer.Argument(help="The checkpoint after.")],
    output: Annotated[Path, options.output("Where the link goes: a file.")],
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write what changed from one checkpoint to the next, bit for bit.

    'shira apply' makes the second of the first again, the same files. Any dtype and any change will
    do; where one weight of a hundred changes, as in reinforcement learning, an entry takes about a
    byte and a half. Other files of the folder come along if they changed; other copies of the
    weights and pickles, such as an optimizer's state, are left out.

    Exit status 2: a checkpoint is damaged, or the output exists; nothing is written.
    """
    out.share_cores()
    from shira.chain import diff

    with Steps("comparing, MB", unit=10**6) as steps:
        told = diff(old, new, output, overwrite=overwrite, progress=steps.tell)
    if as_json:
        out.print_json(told.as_json())
        return
    share = out.percent(told.changed, told.numel, 2)
    lines = {
        "output": f"{told.output}, {out.megabytes(told.size)}",
        "stands on": told.old,
        "makes": told.new,
        "changed": f"{told.changed:,} of {told.numel:,} entries ({share})",
        "size": f"{told.size / max(told.changed, 1):.2f} bytes a changed entry",
    }
    for name, files in (
        ("tensors gone", told.gone),
        ("files carried", told.carried),
        ("left out", told.left_out),
    ):
        if files:
            lines[name] = listed(files)
    out.facts("Difference", lines.items())
    rows = [
        (
            *(t.name, t.dtype, out.shape_text(t.shape), t.old or "-"),
            *(f"{t.changed:,}", out.megabytes(t.size)),
        )
        for t in told.tensors
    ]
    columns = ("tensor", "dtype", "shape", "stands on", "changed", "size")
    out.listing("Changed tensors", columns, rows, right=("changed", "size"))
