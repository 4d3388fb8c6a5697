# SPDX-License-Identifier: Apache-2.0
"""`shira merge`: an adapter into a checkpoint on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.progress import Steps
from shira.errors import listed

if TYPE_CHECKING:
    from shira.convert import Merged, Unmerged

EXAMPLES = (
    "shira merge adapter --base ./llama --output ./llama-merged",
    "shira merge adapter --base ./llama --output ./llama-merged --undo ./merged.undo",
    "shira merge adapter --base ./llama --output ./half --scale 0.5 --overwrite",
    "shira merge adapter --base org/model --output ./merged   # a model of the hub's cache",
    "shira merge adapter --base ./llama --output ./merged --json | jq .lost_to_rounding",
    "shira merge adapter --base ./llama --output ./merged --max-lost 0.2   # else status 2",
)


def command(
    adapter: options.AdapterPath,
    base: Annotated[str, options.base()],
    output: Annotated[
        Path, options.output("Where the merged checkpoint goes: a folder (a file for a file).")
    ],
    scale: options.Scale = 1.0,
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
    check_base: options.CheckBase = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Merge an adapter into a checkpoint on disk.

    The folder is copied, with config, tokenizer and index, and the adapter's entries are
    overwritten in the copy: memory is that of the adapter, and the result has the bits of a model
    that was loaded, merged and saved. The output appears as a whole or not at all. Deltas too small
    for the checkpoint's dtype are lost to rounding; they are counted.

    Exit status 2: the base is another one, quantized or tied, too many deltas are lost, or the
    output exists; nothing is written.
    """
    out.share_cores()
    from shira.convert import merge

    with Steps("merging, MB", unit=10**6) as steps:
        told = merge(
            adapter,
            base,
            output,
            scale=scale,
            undo=undo,
            max_lost=max_lost,
            check_base=check_base,
            overwrite=overwrite,
            progress=steps.tell,
        )
    if as_json:
        out.print_json(told.as_json())
        return
    verdicts = Counter(target.base for target in told.targets)
    lines = {
        **written_files(told),
        "undo file": "not written (--undo)" if told.undo is None else str(told.undo),
        "entries": f"{told.nnz:,} in {len(told.targets)} weights",
        "lost to rounding": out.of_deltas(told.lost, told.nonzero),
        "names": told.naming,
        "base": ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or "-",
    }
    out.facts("Merged", lines.items())
    rows = [
        (t.key, t.dtype, f"{t.nnz:,}", f"{t.lost:,}", out.percent(t.lost, t.nonzero), t.base)
        for t in told.targets
    ]
    columns = ("weight", "dtype", "k", "lost", "lost %", "base")
    out.listing("Weights", columns, rows, right=("k", "lost", "lost %"))
    if told.whole:
        whole = [(w.key, w.dtype, out.shape_text(w.shape), f"{w.changed:,}") for w in told.whole]
        of_whole = ("whole tensor", "dtype", "shape", "changed")
        out.listing("Whole tensors", of_whole, whole, right=("changed",))


def written_files(told: Merged | Unmerged) -> dict[str, str]:
    """Return the lines that tell of the files of a rewritten checkpoint."""
    files = told.written
    lines = {
        "output": f"{told.output}, {out.megabytes(files.size)}",
        "files": f"{len(files.patched)} patched, {len(files.copied)} copied",
    }
    return lines | ({"left behind": listed(files.left_out)} if files.left_out else {})
