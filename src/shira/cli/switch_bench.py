# SPDX-License-Identifier: Apache-2.0
"""`shira switch-bench`: how long it takes here to switch from one adapter to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira switch-bench",
    "shira switch-bench --shape 4096x11008 --layers 8 --rank 16 --dtype float32",
    "shira switch-bench poems code --no-compare",
    "shira switch-bench peft-adapter --base ./my-model/model.safetensors",
    "shira switch-bench --json | jq .switch_seconds.onwards.median",
)


def command(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(help="Adapters to switch between; made up ones when left out."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, if the adapters do not record the shapes: a safetensors file, a "
            "folder with some, or a name on the hub."
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help="Of made up weights.")] = "4096x4096",
    layers: Annotated[int, typer.Option(min=1, help="How many made up weights.")] = 1,
    rank: Annotated[
        int, typer.Option(min=1, help="r (m + n) entries of a made up weight, as LoRA counts.")
    ] = 32,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = (
        "bfloat16"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of the timing.")] = (10),
    compare: Annotated[
        bool, typer.Option(help="Also time PEFT's merge and unmerge on the largest weight.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Time switching on this machine, without a model.

    Weights of the adapters' shapes are filled with random numbers, adapters are put in, exchanged
    and taken out, and every bit is compared with before. Beside it stands the least that it could
    take: reading and writing one word of each 64-byte line of memory that the adapters touch.
    Exit status 1 means that the base did not come back.
    """
    from shira.adapter import Adapter
    from shira.checkpoints import open_checkpoint
    from shira.cli.libraries import offline
    from shira.errors import ConfigError, did_you_mean

    offline()
    from shira.cli._switch_bench import measure, scene, tables

    if dtype not in scene.DTYPES:
        raise ConfigError(
            f"--dtype is one of {', '.join(scene.DTYPES)}, not {dtype!r}."
            f"{did_you_mean(dtype, scene.DTYPES)}"
        )
    for path in adapters or ():
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
    if adapters:
        checkpoint = None if base is None else open_checkpoint(base)
        loaded = {str(path): Adapter.load(path, base=checkpoint) for path in adapters}
    else:
        made_up = {f"layers.{i}.weight": scene.shape_of(shape) for i in range(layers)}
        loaded = {name: scene.random_adapter(made_up, rank, i) for i, name in enumerate("ab")}
    module = scene.module_of(scene.shapes_in(loaded.values()), scene.DTYPES[dtype])
    result = {"dtype": dtype, **measure.measure(loaded, module, repeats)}
    first = next(iter(loaded.values()))
    result["one_weight"] = measure.compare(first, scene.DTYPES[dtype], repeats) if compare else None
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        tables.show(result)
    if not result["base_equal_bit_for_bit"]:
        raise typer.Exit(1)
