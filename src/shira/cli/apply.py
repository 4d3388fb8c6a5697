# SPDX-License-Identifier: Apache-2.0
"""`shira apply`: links of a chain on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.progress import Steps
from shira.errors import ConfigError

EXAMPLES = (
    "shira apply ./step-0 step-1.safetensors --output ./step-1",
    "shira apply ./step-0 step-*.safetensors --output ./latest   # skips those in it",
    "shira apply ./model step-1.safetensors --in-place",
    "shira apply ./model step-1.safetensors --format patch -o patch.safetensors   # vLLM's",
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
    to: Annotated[
        str,
        typer.Option(
            "--format",
            help="checkpoint, or patch: the entries that change alone, as vLLM's sparse weight "
            "patches (a file).",
        ),
    ] = "checkpoint",
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
    options.one_of("--format", to, ("checkpoint", "patch"))
    if to == "patch":
        _write_patches(checkpoint, links, output, in_place, overwrite, as_json)
        return
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


def _write_patches(
    checkpoint: str,
    links: list[Path],
    output: Path | None,
    in_place: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write what the links change as a file of patches, and print what it is."""
    from shira.chain import to_patches
    from shira.convert import save_patches
    from shira.store.atomic import check_outputs

    if output is None or in_place:
        raise ConfigError("patches are a file of their own: name it (--output)")
    check_outputs({"--output": output}, links, [checkpoint])
    options.check_new(output, overwrite, empty_folder=False)
    with Steps("comparing, MB", unit=10**6) as steps:
        patches = to_patches(checkpoint, links, progress=steps.tell)
    save_patches(patches, output)
    count, size = sum(patch.values.numel() for patch in patches), out.file_bytes(output)
    if as_json:
        told = {"output": str(output), "bytes": size, "weights": len(patches), "nnz": count}
        out.print_json(told)
        return
    lines = {
        "output": f"{output}, {out.megabytes(size)}",
        "entries": f"{count:,} in {len(patches)} weights",
    }
    out.facts("Patches", lines.items())
