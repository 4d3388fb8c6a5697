# SPDX-License-Identifier: Apache-2.0
"""The figures of ``shira switch-bench`` as a person reads them."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from shira.cli.output import console, table

_SWITCHES = {"there_and_back": "activate, deactivate", "onwards": "from one to the next"}
_CONTENDERS = {
    "shira": "shira: activate, deactivate",
    "shira_in_peft": "shira's layer in PEFT: merge, unmerge",
    "peft_shira": "PEFT's SHiRA: merge, unmerge",
    "peft_lora": "PEFT's LoRA: merge, unmerge",
}


def show(result: dict[str, Any]) -> None:
    """Print what `measure` and `compare` found."""
    out = console()
    entries = ", ".join(f"{name}: {n:,}" for name, n in result["entries"].items())
    out.print(
        f"{result['weights']} weights, {result['parameters']:,} parameters in {result['dtype']}; "
        f"entries of {entries}"
    )
    out.print(
        f"{result['kernels']}; {result['threads']} threads; loaded in "
        f"{1e3 * result['load_seconds']:.0f} ms"
    )
    out.print(_switching(result))
    if result["one_weight"]:
        out.print(_beside_peft(result["one_weight"]))
    came = "came" if result["base_equal_bit_for_bit"] else "DID NOT come"
    out.print(f"The base {came} back bit for bit.")


def _switching(result: dict[str, Any]) -> Table:
    rows = _table("Switching", "what", "x limit")
    limits = result["limit_seconds"] or {}
    for name, times in result["switch_seconds"].items():
        limit = limits.get(name)
        _add(rows, _SWITCHES[name], times, limit)
        if limit:
            _add(rows, "  limit: its cache lines", limit, None)
    return rows


def _beside_peft(one: dict[str, Any]) -> Table:
    size = "x".join(map(str, one["shape"]))
    title = f"One weight of {size}, {one['entries']:,} entries, LoRA of rank {one['lora_rank']}"
    rows = _table(title, "in and out", "x shira")
    for name, times in one["seconds"].items():
        _add(rows, _CONTENDERS[name], times, one["seconds"]["shira"])
    return rows


def _table(title: str, first: str, ratio: str) -> Table:
    numbers = ("best ms", "median ms", ratio)
    return table(title, first, *numbers, right=numbers)


def _add(rows: Table, what: str, times: dict[str, Any], reference: dict[str, Any] | None) -> None:
    ratio = f"{times['median'] / reference['median']:.1f}" if reference else ""
    rows.add_row(what, f"{1e3 * times['best']:.2f}", f"{1e3 * times['median']:.2f}", ratio)
