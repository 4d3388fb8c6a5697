# SPDX-License-Identifier: Apache-2.0
"""`shira convert`: an adapter from one format to another, or from a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira convert adapter --output adapter.safetensors                      # PEFT to compact",
    "shira convert adapter.safetensors --format peft --output adapter        # and back",
    "shira convert adapter --dtype bfloat16 --output small.safetensors",
    "shira convert stock-adapter --base ./llama --output adapter.safetensors # stock PEFT's",
    "shira convert my-lora --base ./llama --density 0.02 --output adapter.safetensors",
    "shira convert adapter --format patch --base ./llama --output patch.safetensors",
)


def command(
    source: Annotated[
        Path, typer.Argument(help="An adapter in any format, or the folder of a PEFT LoRA.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")],
    to: Annotated[
        str,
        typer.Option(
            "--format",
            "--to",
            help="compact (a file), peft (a folder), or patch (vLLM's sparse weight "
            "patch: replacement values, a file).",
        ),
    ] = "compact",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the stored values: float32, bfloat16, ...")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model: a checkpoint's folder or file, or a name on the hub. Needed for "
            "a patch and for stock PEFT's SHiRA files; of use for a LoRA."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Of a LoRA: keep this share of each weight's entries.")
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", help="Of a LoRA: keep r (m + n) entries of each weight.")
    ] = None,
    everywhere: Annotated[
        bool,
        typer.Option(
            "--everywhere", help="Of a LoRA: spend the budgets on the largest of all weights."
        ),
    ] = False,
    scale: Annotated[float, typer.Option(help="Of a patch: factor on the deltas.")] = 1.0,
    check_base: Annotated[
        bool,
        typer.Option(
            "--check-base/--no-check-base",
            help="Of a patch: refuse a base without the values that the adapter was trained on.",
        ),
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Convert an adapter to another format, or a LoRA to an adapter.

    A LoRA adds B A to a weight, which is no sparse thing: the entries of largest magnitude are
    kept, without --density or --r as many as the LoRA has parameters, and what share of the squared
    update they hold is printed.

    Exit status 2: the source cannot be read or is not supported, or options do not go together;
    nothing is written.
    """
    from shira.cli.quiet import share_cores

    share_cores()
    from shira.cli._convert.converting import Request, run

    request = Request(
        source=source,
        output=output,
        to=to,
        dtype=dtype,
        base=base,
        density=density,
        r=r,
        everywhere=everywhere,
        scale=scale,
        check_base=check_base,
        overwrite=overwrite,
    )
    result, show = run(request)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show()
