# SPDX-License-Identifier: Apache-2.0
"""`shira convert`: an adapter from one format to another, or from a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shira.cli import options
from shira.cli import output as out
from shira.cli.progress import Steps
from shira.errors import ConfigError

if TYPE_CHECKING:
    from shira.adapter import Adapter

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
    output: Annotated[Path, options.output("Where the result goes.")],
    to: Annotated[
        str,
        typer.Option(
            "--format",
            "--to",
            help="compact (a file), peft (a folder), or patch (vLLM's sparse weight "
            "patch: replacement values, a file).",
        ),
    ] = "compact",
    dtype: options.Dtype = None,
    base: Annotated[
        str | None,
        options.base("Needed for a patch and for stock PEFT's SHiRA files; of use for a LoRA."),
    ] = None,
    density: options.Density = None,
    r: options.Rank = None,
    everywhere: options.Everywhere = False,
    scale: options.Scale = 1.0,
    check_base: options.CheckBase = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Convert an adapter to another format, or a LoRA to an adapter.

    A LoRA adds B A to a weight, which is not sparse: the entries of largest magnitude are kept,
    without --density or --r as many as the LoRA has parameters, and what share of the squared
    update they hold is printed. --density, --r and --everywhere are for a LoRA alone, --scale and
    --no-check-base for a patch.

    Exit status 2: the source cannot be read or is not supported, or options do not go together;
    nothing is written.
    """
    out.share_cores()
    from shira.adapter import Adapter
    from shira.checkpoints import open_checkpoint
    from shira.convert import from_lora, is_lora, save_patches, to_patches
    from shira.store import FORMATS
    from shira.store.atomic import check_outputs

    check_outputs({"--output": output}, [source], [base])
    options.one_of("--format", to, (*FORMATS, "patch"))
    options.check_new(output, overwrite)
    options.dtype_named(dtype)
    checkpoint = None if base is None else open_checkpoint(base)
    options.check_paths([source])
    lora = is_lora(source)
    if not lora and (density is not None or r is not None or everywhere):
        raise ConfigError(f"{source} is no LoRA, and --density, --r and --everywhere are for one")
    if to != "patch" and (scale != 1.0 or not check_base):
        raise ConfigError("--scale and --no-check-base are for --format patch")
    if to == "patch" and dtype is not None:
        raise ConfigError("a patch has the base's dtype, so --dtype is not for it")
    if to == "patch" and checkpoint is None:
        raise ConfigError("a patch holds replacement values, so it needs --base")

    made = None
    if lora:
        limits: dict[str, Any] = {"density": density, "r": r, "everywhere": everywhere}
        with Steps("multiplying, million entries", unit=10**6) as steps:
            made = from_lora(source, base=checkpoint, progress=steps.tell, **limits)
    adapter = Adapter.load(source, base=checkpoint) if made is None else made.adapter
    if to == "patch":
        assert checkpoint is not None  # checked
        save_patches(to_patches(adapter, checkpoint, scale=scale, check_base=check_base), output)
    else:
        save(adapter, output, to, dtype)
    size = out.file_bytes(output)
    if as_json:
        told = {
            "output": str(output),
            "format": to,
            "bytes": size,
            "parameters": len(adapter),
            "nnz": adapter.nnz,
            "density": adapter.density,
            "whole_tensors": list(adapter.tensors),
        }
        out.print_json(told if made is None else told | made.as_json())
        return
    sparse = size - sum(tensor.nbytes for tensor in adapter.tensors.values())
    lines = {
        "output": f"{output}, {to}, {out.megabytes(size)}",
        "entries": f"{adapter.nnz:,} in {len(adapter)} weights, density {adapter.density:.2%}",
        "size": f"{sparse / max(adapter.nnz, 1):.2f} bytes an entry",
    }
    if made is not None:
        lines["energy kept"] = f"{made.energy_share:.2%} of the squared update"
    lines |= {f"whole {name}": kind for name, kind in out.whole_tensors(adapter.tensors).items()}
    out.facts("Converted" if made is None else "From LoRA", lines.items())
    if made is not None:
        rows = [
            (kept.name, kept.rank, f"{kept.kept:,}", out.percent(kept.energy_kept, kept.energy, 2))
            for kept in made.weights
        ]
        numbers = ("rank", "kept", "energy")
        out.listing("Weights", ("weight", *numbers), rows, right=numbers)


def save(adapter: Adapter, path: Path, format: str, dtype: str | None) -> None:
    """Write an adapter as ``--format`` and ``--dtype`` say."""
    if format == "compact":
        path.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path, format=format, dtype=options.dtype_named(dtype))  # type: ignore[arg-type]
