# SPDX-License-Identifier: Apache-2.0
"""`shira extract`: the adapter between two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.convert import save
from shira.cli.progress import Steps
from shira.errors import listed

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
    output: Annotated[Path, options.output("Where the adapter goes.")],
    density: options.Density = None,
    r: options.Rank = None,
    everywhere: options.Everywhere = False,
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
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Find the adapter that leads from one checkpoint to another.

    Where the tuned model differs in few entries, the adapter holds them all and is exact: merged
    into the base it gives the tuned weights bit for bit, unless --dtype rounds its values. A model
    that was tuned in full differs nearly everywhere and needs a budget, --density or --r: the
    entries that changed most are kept, and what share of the squared difference they hold is
    printed.

    Exit status 1: without a budget, some entry could not be carried exactly.
    """
    out.share_cores()
    from shira.convert import extract
    from shira.store import FORMATS
    from shira.store.atomic import check_outputs

    check_outputs({"--output": output}, checkpoints=[base, tuned])
    options.one_of("--format", to, FORMATS)
    options.check_new(output, overwrite)
    stored = options.dtype_named(dtype)
    with Steps("comparing, million entries", unit=10**6) as steps:
        told = extract(
            base,
            tuned,
            density=density,
            r=r,
            everywhere=everywhere,
            include=include or ("*",),
            exclude=exclude or (),
            progress=steps.tell,
        )
    save(told.adapter, output, to, dtype)
    size = out.file_bytes(output)
    kept = stored is None or (
        stored.is_floating_point
        and all(bool((d.values.to(stored) == d.values).all()) for d in told.adapter.values())
    )
    exact = told.exact and kept
    if as_json:
        made = {"output": str(output), "format": to, "bytes": size}
        out.print_json({**made, **told.as_json(), "exact": exact})
    else:
        found = told.as_json()
        lines = {
            "output": f"{output}, {to}, {out.megabytes(size)}",
            "entries": f"{found['nnz']:,} in {len(told.adapter)} weights, density "
            f"{found['density']:.2%}; {found['differing']:,} differ",
            "exact": "no",
            "energy kept": f"{told.energy_share:.4%} of the squared difference",
        }
        if exact:
            lines["exact"] = "yes: base and adapter give the tuned weights, bit for bit"
        elif told.exact:
            lines["exact"] = "not in the dtype that it was saved in"
        if found["missed"]:
            missed = f"{found['missed']:,} entries"
            lines["not reached"] = f"{missed}, which no float64 delta carries there exactly"
        for field in ("excluded", "only_in_base", "only_in_tuned", "not_compared"):
            if found[field]:
                lines[field.replace("_", " ")] = listed(found[field])
        out.facts("Extracted", lines.items())
        rows = [
            (c.name, f"{c.differing:,}", f"{c.kept:,}", out.percent(c.energy_kept, c.energy, 2))
            for c in told.changes
        ]
        numbers = ("differ", "kept", "energy")
        out.listing("Weights", ("weight", *numbers), rows, right=numbers)
    if density is None and r is None and not told.exact:
        raise typer.Exit(1)
