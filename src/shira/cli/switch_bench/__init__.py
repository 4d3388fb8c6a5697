# SPDX-License-Identifier: Apache-2.0
"""`shira switch-bench`: how long it takes here to switch from one adapter to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shira.cli import options
from shira.cli.output import offline, print_json, print_table, write

EXAMPLES = (
    "shira switch-bench",
    "shira switch-bench --shape 4096x11008 --layers 8 --rank 16 --dtype float32",
    "shira switch-bench poems code --no-compare",
    "shira switch-bench peft-adapter --base ./my-model/model.safetensors",
    "shira switch-bench --json | jq .switch_seconds.onwards.median",
)

_SWITCHES = {"there_and_back": "activate, deactivate", "onwards": "from one to the next"}
_CONTENDERS = {
    "shira": "shira: activate, deactivate",
    "shira_in_peft": "shira's layer in PEFT: merge, unmerge",
    "peft_shira": "PEFT's SHiRA: merge, unmerge",
    "peft_lora": "PEFT's LoRA: merge, unmerge",
}


def command(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(help="Adapters to switch between; made up ones when left out."),
    ] = None,
    base: options.BaseForShapes = None,
    shape: Annotated[str, typer.Option(help="Of made up weights.")] = "4096x4096",
    layers: Annotated[int, typer.Option(min=1, help="How many made up weights.")] = 1,
    rank: Annotated[
        int, typer.Option(min=1, help="r (m + n) entries of a made up weight, as LoRA counts.")
    ] = 32,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, float16.")
    ] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of the timing.")] = 10,
    compare: Annotated[
        bool, typer.Option(help="Also time PEFT's merge and unmerge on the largest weight.")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Time switching on this machine, without a model.

    Weights of the adapters' shapes are filled with random numbers, adapters are put in, exchanged
    and taken out, and every bit is compared with before. Beside it stands the least that it could
    take: reading and writing one word of each 64-byte line of memory that the adapters touch.
    Exit status 1 means that the base did not come back.
    """
    offline()
    from shira.adapter import Adapter
    from shira.checkpoints import open_checkpoint
    from shira.cli.switch_bench import contenders

    options.one_of("--dtype", dtype, contenders.DTYPES)
    options.check_paths(adapters or ())
    if adapters:
        checkpoint = None if base is None else open_checkpoint(base)
        loaded = {str(path): Adapter.load(path, base=checkpoint) for path in adapters}
    else:
        made_up = {f"layers.{i}.weight": contenders.shape_of(shape) for i in range(layers)}
        loaded = {name: contenders.random_adapter(made_up, rank, i) for i, name in enumerate("ab")}
    module = contenders.module_of(contenders.shapes_in(loaded), contenders.DTYPES[dtype])
    result = {"dtype": dtype, **contenders.measure(loaded, module, repeats)}
    first = next(iter(loaded.values()))
    beside = contenders.compare(first, contenders.DTYPES[dtype], repeats) if compare else None
    result["one_weight"] = beside
    if as_json:
        print_json(result)
    else:
        _show(result)
    if not result["base_equal_bit_for_bit"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    entries = ", ".join(f"{name}: {n:,}" for name, n in result["entries"].items())
    write(
        f"{result['weights']} weights, {result['parameters']:,} parameters in {result['dtype']}; "
        f"entries of {entries}"
    )
    write(
        f"{result['kernels']}; {result['threads']} threads; loaded in "
        f"{1e3 * result['load_seconds']:.0f} ms"
    )
    rows = []
    for way, times in result["switch_seconds"].items():
        limit = (result["limit_seconds"] or {}).get(way)
        rows.append(_row(_SWITCHES[way], times, limit))
        if limit:
            rows.append(_row("  limit: its cache lines", limit))
    numbers = ("best ms", "median ms", "x limit")
    print_table("Switching", ("what", *numbers), rows, numbers)
    one = result["one_weight"]
    if one:
        size = "x".join(map(str, one["shape"]))
        title = f"One weight of {size}, {one['entries']:,} entries, LoRA of rank {one['lora_rank']}"
        seconds = one["seconds"]
        rows = [_row(_CONTENDERS[name], times, seconds["shira"]) for name, times in seconds.items()]
        numbers = ("best ms", "median ms", "x shira")
        print_table(title, ("in and out", *numbers), rows, numbers)
    came = "came" if result["base_equal_bit_for_bit"] else "DID NOT come"
    write(f"The base {came} back bit for bit.")


def _row(name: str, times: Any, reference: Any = None) -> tuple[str, ...]:
    ratio = f"{times['median'] / reference['median']:.1f}" if reference else ""
    return name, f"{1e3 * times['best']:.2f}", f"{1e3 * times['median']:.2f}", ratio
