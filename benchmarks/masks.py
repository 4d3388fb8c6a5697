# SPDX-License-Identifier: Apache-2.0
"""Suite ``masks``: choosing the entries at random, for one layer and for a model.

*Layers*: PEFT's ``random_mask`` and ``shira.masks.random_support`` with the same shape and budget,
taking turns. Only the choice is timed, which favours PEFT: its mask is a dense m x n tensor that
has to be turned into indices afterwards; a support is the indices.

*Model*: ``get_peft_model`` on about a billion bf16 parameters (16 blocks of seven linear layers,
all zero: random masks do not look at the values), as a whole, and the masks of the same layers
alone. PEFT's own is run on one block of the same model, beside ours on one block.

Checked before timing: both choose exactly k distinct entries of the weight; the same seed and name
give the same entries. What two layers of equal shape share under one seed is reported for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks import environment, report
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "masks"
SEED = 42


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    shapes: str = field(default="4096x4096,4096x11008", metadata={"help": "weights, as MxN,MxN"})
    r: int = field(default=32, metadata={"help": "r * (m + n) entries of an m x n weight"})
    repeats: int = field(default=7, metadata={"help": "timed rounds for the layers"})
    blocks: int = field(
        default=16, metadata={"help": "blocks of the model; 0 leaves the model out"}
    )
    hidden: int = field(default=2048, metadata={"help": "hidden size of the model"})
    intermediate: int = field(default=8192, metadata={"help": "size of the model's MLPs"})
    model_repeats: int = field(default=3, metadata={"help": "timed rounds for the model"})
    threads: int = field(default=0, metadata={"help": "torch threads; 0: torch's own choice"})

    def parsed_shapes(self) -> list[tuple[int, int]]:
        shapes = []
        for text in self.shapes.split(","):
            m, _, n = text.partition("x")
            shapes.append((int(m), int(n)))
        return shapes


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check and time; the whole JSON document of the suite."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    surroundings = environment.describe()
    progress("masks: comparing the answers")
    answers = check_answers(settings.r)
    layers = {}
    neighbours = environment.Neighbours()
    for shape in settings.parsed_shapes():
        label = "x".join(map(str, shape))
        layers[label] = _time_layer(
            shape, settings, lambda text, at=label: progress(f"masks: {at}, {text}")
        )
    model = _time_model(settings, progress) if settings.blocks else None
    surroundings["cpu_share_of_others"] = neighbours.share()
    body = {"answers": answers, "results": {"layers": layers, "model": model}}
    return report.document(NAME, asdict(settings), surroundings, body)


def check_answers(r: int) -> dict[str, Any]:
    """Counts, range, repeatability; what two layers of equal shape share.

    Raises:
        RuntimeError: If a mask is not what both libraries promise.
    """
    from shira.masks import random_support

    m, n = 256 + 8 * r, 192 + 8 * r
    k = r * (m + n)
    first, again, other = (
        random_support((m, n), k, seed=SEED, name=name) for name in ("first", "first", "other")
    )
    ours, repeated, second = (support.indices for support in (first, again, other))
    if len(set(ours.tolist())) != k or not 0 <= int(ours.min()) <= int(ours.max()) < m * n:
        raise RuntimeError("shira's random mask is not k distinct entries of the weight")
    if not torch.equal(ours, repeated):
        raise RuntimeError(
            "shira's random mask differs between two calls with the same seed and name"
        )
    masks = [_peft_mask(_empty_linear(m, n), r) for _ in range(2)]
    if int(masks[0].sum()) != k:
        raise RuntimeError("PEFT's random mask does not have k ones")
    return {
        "entries_are_k_distinct": True,
        "repeatable": True,
        "share_chosen": k / (m * n),
        "shared_by_two_layers_of_equal_shape": {
            "shira": len(set(ours.tolist()) & set(second.tolist())) / k,
            "peft-shira": int((masks[0].bool() & masks[1].bool()).sum()) / k,
        },
    }


def _time_layer(
    shape: tuple[int, int], settings: Settings, progress: Callable[[str], None]
) -> dict[str, Any]:
    from shira.masks import random_support

    k = settings.r * sum(shape)
    linear = _empty_linear(*shape)
    laps = interleave(
        {
            "shira": _timed(lambda: random_support(shape, k, seed=SEED, name="weight")),
            "peft-shira": _timed(lambda: _peft_mask(linear, settings.r)),
        },
        settings.repeats,
        progress=progress,
    )
    return {"k": k, **_figures(laps)}


def _time_model(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Whole model: ours and its masks alone. One block: ours and PEFT's."""
    from shira.masks import random_support

    shapes = _shapes(settings, settings.blocks)

    def masks_alone() -> None:
        for name, (m, n) in shapes.items():
            random_support((m, n), settings.r * (m + n), seed=SEED, name=name)

    whole = interleave(
        {
            "get_peft_model": lambda: _adapt("shira", settings, settings.blocks),
            "masks_alone": _timed(masks_alone),
        },
        settings.model_repeats,
        progress=lambda text: progress(f"masks: a model of {settings.blocks} blocks, {text}"),
    )
    block = interleave(
        {name: lambda name=name: _adapt(name, settings, 1) for name in ("shira", "peft-shira")},
        settings.model_repeats,
        progress=lambda text: progress(f"masks: one block, {text}"),
    )
    return {
        "parameters": sum(m * n for m, n in shapes.values()),
        "layers": len(shapes),
        "chosen_entries": sum(settings.r * (m + n) for m, n in shapes.values()),
        "whole_wall_seconds": {name: _walls(laps) for name, laps in whole.items()},
        "one_block": _figures(block),
    }


def _adapt(name: str, settings: Settings, blocks: int) -> Laps:
    """Wrap a new model, and time the wrapping alone."""
    base = _model(settings, blocks)
    options = {"r": settings.r, "target_modules": list(_block(settings)), "random_seed": SEED}
    if name == "shira":
        from shira import ShiraConfig, get_peft_model

        laps = Laps()
        get_peft_model(base, ShiraConfig(**options))
    else:
        from peft.tuners.shira.config import ShiraConfig as StockConfig
        from peft.tuners.shira.model import ShiraModel as StockModel

        laps = Laps()
        StockModel(base, {"default": StockConfig(**options)}, "default")
    laps.mark("wrap")
    return laps


def _block(settings: Settings) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: name and (out, in)."""
    h, i = settings.hidden, settings.intermediate
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (h, h))
    return {**attention, "gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}


def _shapes(settings: Settings, blocks: int) -> dict[str, tuple[int, int]]:
    return {
        f"layers.{i}.{name}.weight": shape
        for i in range(blocks)
        for name, shape in _block(settings).items()
    }


def _model(settings: Settings, blocks: int) -> nn.Module:
    """Plain linear layers, written to once, so that their memory is there as a loaded model's is:
    otherwise what is timed is the first touch of each page."""
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({name: _empty_linear(*shape) for name, shape in _block(settings).items()})
        for _ in range(blocks)
    )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def _empty_linear(out_features: int, in_features: int) -> nn.Linear:
    return nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias=False, dtype=torch.bfloat16
    )


def _peft_mask(linear: nn.Linear, r: int) -> torch.Tensor:
    from peft.tuners.shira.mask_functions import random_mask

    return random_mask(linear, r, random_seed=SEED)


def _timed(work: Callable[[], Any]) -> Callable[[], Laps]:
    def timed() -> Laps:
        laps = Laps()
        work()
        laps.mark("mask")
        return laps

    return timed


def _walls(laps: list[Laps]) -> dict[str, Any]:
    samples = [lap.total.wall for lap in laps]
    return {**summary(samples), "samples": samples}


def _figures(laps: dict[str, list[Laps]]) -> dict[str, Any]:
    seconds = {name: _walls(runs) for name, runs in laps.items()}
    ratio = ratios(seconds["shira"]["samples"], seconds["peft-shira"]["samples"])
    return {"wall_seconds": seconds, "shira_over_peft": ratio}


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    shared = result["answers"]["shared_by_two_layers_of_equal_shape"]
    table = report.Table(
        f"Random masks, r = {result['settings']['r']}",
        ["what", "shira ms", "PEFT ms", "shira / PEFT median [quartiles]"],
        notes=[
            "Two layers of equal shape under one seed share "
            f"{100 * shared['shira']:.1f} % of their entries in shira, "
            f"{100 * shared['peft-shira']:.1f} % in PEFT "
            f"(chance: {100 * result['answers']['share_chosen']:.1f} %).",
            *report.busy_note(result),
        ],
    )
    rows = {f"one layer, {label}": row for label, row in result["results"]["layers"].items()}
    model = result["results"]["model"]
    if model:
        rows["get_peft_model, one block"] = model["one_block"]
        whole = model["whole_wall_seconds"]
        table.notes.append(
            f"get_peft_model on {model['parameters'] / 1e9:.2f} billion parameters in "
            f"{model['layers']} layers: {whole['get_peft_model']['median']:.2f} s; "
            f"the masks alone {whole['masks_alone']['median']:.2f} s."
        )
    for label, row in rows.items():
        seconds, ratio = row["wall_seconds"], row["shira_over_peft"]
        table.rows.append(
            [
                label,
                f"{1e3 * seconds['shira']['median']:.1f}",
                f"{1e3 * seconds['peft-shira']['median']:.1f}",
                f"{ratio['median']:.4f} [{ratio['q1']:.4f}, {ratio['q3']:.4f}]",
            ]
        )
    return [table]
