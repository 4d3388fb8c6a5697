# SPDX-License-Identifier: Apache-2.0
"""Suite ``switching``: from one adapter to another, and whether the base comes back.

*Layer*: one weight. In and out again: `Switch`, shira's layers inside PEFT, PEFT's SHiRA with
values in float32 (as ``get_peft_model`` makes them) and in the weight's dtype, and PEFT's LoRA of
equal parameter count, taking turns, so that each finds its weight driven out of the caches.
Beside them the least that `Switch` could do: reading and writing one word of each 64-byte line that
the adapters touch, while as many bytes are read beside it as the adapters have. `Switch` and that
limit also take turns alone; once in and out, and once from one adapter to the next.

*Model*: the same for about a billion parameters in ``7 * blocks`` weights, `Switch` on all of them
at once, PEFT on one at a time (its dense temporaries would not fit beside each other), summed.

*Drift*: eight overlapping adapters and 1,000 switches in random order, with scales and two or three
at once every fourth time, in float32, bfloat16 and float16. PEFT's SHiRA merges and unmerges one
of the same adapters each time, at scale 1. Counted: entries of the base that are other bits
afterwards.

Checked before timing: `Switch` and shira's layers in PEFT write the same bits, PEFT the same
entries within the dtype's resolution, and the base comes back from the first two.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import environment, report
from benchmarks.timing import Laps, interleave, quartiles, ratios, summary
from shira import Adapter, Switch
from shira.cli.switch_bench.contenders import (
    DTYPES,
    Switching,
    digest,
    limits,
    linear_around,
    merge_and_unmerge,
    module_of,
    peft_lora,
    peft_shira,
    random_adapter,
    shape_of,
    shira_in_peft,
)
from shira.ops import native

NAME = "switching"


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    shape: str = field(default="4096x4096", metadata={"help": "the one weight, as MxN"})
    r: int = field(default=32, metadata={"help": "r (m + n) entries of each weight"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the weights"})
    repeats: int = field(default=15, metadata={"help": "rounds for the one weight"})
    blocks: int = field(default=16, metadata={"help": "of the model; 0 leaves it out"})
    hidden: int = field(default=2048, metadata={"help": "of the model"})
    intermediate: int = field(default=8192, metadata={"help": "of the model"})
    model_repeats: int = field(default=7, metadata={"help": "rounds for the model, ours"})
    peft_rounds: int = field(default=1, metadata={"help": "rounds for the model, PEFT"})
    drift_size: int = field(default=256, metadata={"help": "rows and columns of the weight"})
    drift_switches: int = field(default=1000, metadata={"help": "how many; 0 leaves it out"})


def unavailable() -> str | None:
    """Why the suite cannot run here, if it cannot: the limit is measured with compiled code."""
    loaded = native.load()
    return None if loaded.library else loaded.why


def run(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    described = environment.describe()
    neighbours = environment.Neighbours()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        progress("one weight")
        answers, layer = _layer(settings)
        progress("the model")
        model = _model(settings, progress) if settings.blocks else None
        drift = {}
        for name, dtype in DTYPES.items():
            progress(f"drift in {name}")
            if settings.drift_switches:
                drift[name] = _drift(settings, dtype)
    described["cpu_share_of_others"] = neighbours.share()
    results = {"layer": layer, "model": model, "drift": drift or None}
    return report.document(
        NAME, asdict(settings), described, {"answers": answers, "results": results}
    )


def _timed(work: Callable[[], object]) -> Callable[[], Laps]:
    def once() -> Laps:
        laps = Laps()
        work()
        laps.mark("switch")
        return laps

    return once


def _seconds(
    runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    laps = interleave({n: _timed(work) for n, work in runs.items()}, repeats, warmup=warmup)
    return {name: [lap.total.wall for lap in kept] for name, kept in laps.items()}


def _beside(seconds: dict[str, list[float]], reference: str) -> dict[str, Any]:
    return {
        name: {**summary(samples), "ratio": ratios(samples, seconds[reference]), "samples": samples}
        for name, samples in seconds.items()
    }


def _against_the_limit(ours: Switching, repeats: int) -> dict[str, Any]:
    ways = {"there_and_back": ours.there_and_back, "onwards": ours.onwards}
    least = limits(ours)
    result = {
        way: _beside(_seconds({"limit": least[way], "shira": run}, repeats), "limit")
        for way, run in ways.items()
    }
    ours.switch.deactivate()
    return result


# -------------------------------------------------------------------------------------- one weight


def _layer(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    dtype = DTYPES[settings.dtype]
    shapes = {"layer.weight": shape_of(settings.shape)}
    adapters = {name: random_adapter(shapes, settings.r, i) for i, name in enumerate("ab")}
    delta = adapters["a"]["layer.weight"]

    def linear() -> nn.Linear:
        return linear_around(next(module_of(shapes, dtype).parameters()))

    ours = Switching(module_of(shapes, dtype), adapters)
    layers = {
        "shira_in_peft": shira_in_peft(linear(), delta),
        "peft_shira": peft_shira(linear(), delta),
        "peft_shira_narrow": peft_shira(linear(), delta, dtype),
        "peft_lora": peft_lora(linear(), settings.r),
    }
    answers = _check_layer(ours, layers, adapters["a"])
    # Like each contender the limit has a weight of its own, which the others have driven out of
    # the caches by its turn.
    limit = limits(Switching(module_of(shapes, dtype), adapters))["there_and_back"]
    contenders = {name: partial(merge_and_unmerge, layer) for name, layer in layers.items()}
    runs = {"shira": ours.there_and_back, **contenders, "limit": limit}
    taken = _beside(_seconds(runs, settings.repeats), "shira")
    return answers, {
        "entries": delta.nnz,
        "there_and_back": taken,
        "against_the_limit": _against_the_limit(ours, settings.repeats),
    }


def _check_layer(ours: Switching, layers: dict[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The answers agree, and who gives the base back.

    Raises:
        RuntimeError: If they do not.
    """
    weight = next(ours.module.parameters())
    before = weight.clone()
    delta = adapter["layer.weight"]
    at = delta.support.indices.long()
    want = before.clone()
    want.view(-1)[at] = delta.replacement(before.view(-1)[at])
    ours.switch.activate("a")
    if not torch.equal(weight, want):
        raise RuntimeError("answers differ: Switch does not write the replacement values")
    ours.switch.deactivate()
    back = {"shira": torch.equal(weight, before)}
    for name, layer in layers.items():
        merged = layer.get_base_layer().weight
        with torch.no_grad():
            layer.merge()
            if name == "shira_in_peft" and not torch.equal(merged, want):
                raise RuntimeError("answers differ: shira's layer merges other bits than Switch")
            if name.startswith("peft_shira"):
                eps = 2 * torch.finfo(merged.dtype).eps * want.abs().max()
                if (merged.float() - want.float()).abs().max() > eps:
                    raise RuntimeError(f"answers differ: {name} merges other values")
            if name == "peft_lora" and torch.equal(merged, before):
                raise RuntimeError("answers differ: LoRA merges nothing")
            layer.unmerge()
        back[name] = torch.equal(merged, before)
    if not (back["shira"] and back["shira_in_peft"]):
        raise RuntimeError("the base did not come back bit for bit")
    return {"replacement_values_equal_bit_for_bit": True, "base_came_back_bit_for_bit": back}


# --------------------------------------------------------------------------------------- the model


def _shapes(settings: Settings) -> dict[str, tuple[int, int]]:
    h, i = settings.hidden, settings.intermediate
    kinds = {"q": (h, h), "k": (h // 4, h), "v": (h // 4, h), "o": (h, h)}
    kinds |= {"gate": (i, h), "up": (i, h), "down": (h, i)}
    return {
        f"blocks.{block}.{kind}.weight": shape
        for block in range(settings.blocks)
        for kind, shape in kinds.items()
    }


def _model(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    dtype, shapes = DTYPES[settings.dtype], _shapes(settings)
    module = module_of(shapes, dtype)
    before = digest(module)
    adapters = {name: random_adapter(shapes, settings.r, i) for i, name in enumerate("ab")}
    ours = Switching(module, adapters)
    against = _against_the_limit(ours, settings.model_repeats)
    if digest(module) != before:
        raise RuntimeError("the base did not come back bit for bit")
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "weights": len(shapes),
        "entries": adapters["a"].nnz,
        "against_the_limit": against,
        "peft_seconds": None,
    }
    if settings.peft_rounds:
        result["peft_seconds"] = _peft_on_each(settings, module, adapters["a"], progress)
        shira = quartiles(against["there_and_back"]["shira"]["samples"])[1]
        result["peft_over_shira"] = {
            name: seconds / shira for name, seconds in result["peft_seconds"].items()
        }
    return result


def _peft_on_each(
    settings: Settings, module: nn.Module, adapter: Adapter, progress: Callable[[str], None]
) -> dict[str, float]:
    """Medians of merge and unmerge of each weight, on a copy of it, summed over the weights."""
    total = {"peft_shira": 0.0, "peft_shira_narrow": 0.0, "peft_lora": 0.0}
    for number, (name, weight) in enumerate(module.named_parameters()):
        progress(f"PEFT on weight {number + 1} of {len(adapter)}")
        delta, copies = adapter[name], [linear_around(weight.clone()) for _ in total]
        layers = {
            "peft_shira": peft_shira(copies[0], delta),
            "peft_shira_narrow": peft_shira(copies[1], delta, weight.dtype),
            "peft_lora": peft_lora(copies[2], settings.r),
        }
        runs = {name: partial(merge_and_unmerge, layer) for name, layer in layers.items()}
        for contender, samples in _seconds(runs, settings.peft_rounds, warmup=1).items():
            total[contender] += quartiles(samples)[1]
    return total


# ------------------------------------------------------------------------------------------- drift


def _drift(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"layer.weight": (settings.drift_size, settings.drift_size)}
    r = max(1, settings.drift_size // 16)
    adapters = {name: random_adapter(shapes, r, i) for i, name in enumerate("abcdefgh")}
    module = module_of(shapes, dtype)
    weight = next(module.parameters())
    before = weight.clone()
    switch = Switch(module)
    layers = {}
    drifting = weight.clone()
    for name, adapter in adapters.items():
        switch.load(name, adapter)
        layers[name] = peft_shira(linear_around(drifting), adapter["layer.weight"])
    touched = torch.zeros(weight.shape, dtype=torch.bool)
    draw = random.Random(0)
    with torch.no_grad():
        for turn in range(settings.drift_switches):
            chosen = draw.sample(sorted(adapters), draw.randint(2, 3) if turn % 4 == 3 else 1)
            switch.activate({name: draw.choice([1.0, 0.5, -0.7, 2.0]) for name in chosen})
            layer = layers[chosen[0]]
            layer.merge()
            layer.unmerge()
            touched |= adapters[chosen[0]]["layer.weight"].support.mask()
        switch.deactivate()
    changed = drifting != before
    return {
        "switches": settings.drift_switches,
        "entries_touched": int(touched.sum()),
        "changed_by_shira": int((weight != before).sum()),
        "changed_by_peft": int(changed.sum()),
        "largest_change_by_peft": float((drifting.float() - before.float()).abs().max()),
    }


# ------------------------------------------------------------------------------------------ tables


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    made = [_beside_peft(result), _beside_the_limit(result)]
    if result["results"]["drift"]:
        made.append(_drifts(result["results"]["drift"]))
    return made


NAMES = {
    "limit": "the cache lines that shira touches, twice",
    "shira": "shira: activate, deactivate",
    "shira_in_peft": "shira's layer in PEFT: merge, unmerge",
    "peft_shira": "PEFT's SHiRA, values in float32",
    "peft_shira_narrow": "PEFT's SHiRA, values in the weight's dtype",
    "peft_lora": "PEFT's LoRA: fuse, unfuse",
}


def _beside_peft(result: dict[str, Any]) -> report.Table:
    settings, results = result["settings"], result["results"]
    table = report.Table(
        f"In and out again: one {settings['shape']} weight in {settings['dtype']}, r = "
        f"{settings['r']}, taking turns",
        ["what", "best ms", "median ms", "x shira, median [quartiles]"],
        notes=report.busy_note(result),
    )
    for name, row in results["layer"]["there_and_back"].items():
        ratio = row["ratio"]  # to shira
        table.rows.append(
            [
                NAMES[name],
                f"{1e3 * row['min']:.2f}",
                f"{1e3 * row['median']:.2f}",
                f"{ratio['median']:.1f} [{ratio['q1']:.1f}, {ratio['q3']:.1f}]",
            ]
        )
    model = results["model"]
    if model and model["peft_seconds"]:
        ours = model["against_the_limit"]["there_and_back"]["shira"]["median"]
        each = ", ".join(
            f"{NAMES[name]} {seconds:.2f} s ({model['peft_over_shira'][name]:.0f} x)"
            for name, seconds in model["peft_seconds"].items()
        )
        table.notes.append(
            f"{model['parameters'] / 1e9:.2f} billion parameters in {model['weights']} weights: "
            f"shira {ours:.4f} s, {each}."
        )
    return table


def _beside_the_limit(result: dict[str, Any]) -> report.Table:
    table = report.Table(
        "Switch beside the least it could do: a word of each touched cache line, read and written",
        ["what", "shira ms", "limit ms", "x limit, median [quartiles]"],
        notes=report.busy_note(result),
    )
    for place in ("layer", "model"):
        against = (result["results"][place] or {}).get("against_the_limit", {})
        for way, rows in against.items():
            ratio = rows["shira"]["ratio"]
            table.rows.append(
                [
                    f"{place}, {way.replace('_', ' ')}",
                    f"{1e3 * rows['shira']['median']:.2f}",
                    f"{1e3 * rows['limit']['median']:.2f}",
                    f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                ]
            )
    return table


def _drifts(drift: dict[str, Any]) -> report.Table:
    table = report.Table(
        "Entries of the base that are other bits after switching among eight adapters",
        ["weight", "switches", "entries touched", "shira", "PEFT's SHiRA", "PEFT's largest change"],
    )
    for name, row in drift.items():
        table.rows.append(
            [
                name,
                str(row["switches"]),
                str(row["entries_touched"]),
                str(row["changed_by_shira"]),
                f"{row['changed_by_peft']} "
                f"({100 * row['changed_by_peft'] / row['entries_touched']:.0f} %)",
                f"{row['largest_change_by_peft']:.3g}",
            ]
        )
    return table
