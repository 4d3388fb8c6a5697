# SPDX-License-Identifier: Apache-2.0
"""Suite ``gpu_adapters``: switching, masks and mixed batches on a GPU, Llama-3.2-3B's shapes.

*Switching*: in and out again, one weight and all linear layers: `Switch`, shira's layer in PEFT,
PEFT's SHiRA and LoRA. Checked: the base comes back bit for bit (of PEFT's it is reported). PEFT's
are timed on the weights of one block, one at a time, and taken times the blocks.

*Masks*: choosing the entries of one weight, and adapting the whole model. Checked: magnitude masks
are those of the CPU.

*Mixed batch*: a forward pass whose samples name different adapters, beside the base alone and
PEFT's LoRA. Checked in float32, two layers: each sample's logits are those of it alone, merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, gpu, gpu_answers, gpu_contenders, mixed_batch, report
from benchmarks.gpu_contenders import BLOCK_SIZE, SEED, TARGETS, Shape
from benchmarks.timing import Laps, interleave, ratios, summary
from shira.ops import use_backend
from shira.ops.gradient.triton import available

NAME = "gpu_adapters"


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    layers: int = field(default=Shape.layers, metadata={"help": "decoder layers"})
    hidden: int = field(default=Shape.hidden, metadata={"help": "hidden size"})
    intermediate: int = field(default=Shape.intermediate, metadata={"help": "size of the MLP"})
    heads: int = field(default=Shape.heads, metadata={"help": "attention heads"})
    kv_heads: int = field(default=Shape.kv_heads, metadata={"help": "key and value heads"})
    vocab: int = field(default=512, metadata={"help": "vocabulary"})
    size: int = field(default=4096, metadata={"help": "rows and columns of the one weight"})
    r: int = field(default=32, metadata={"help": "r * (m + n) trained values a layer"})
    mixed_layers: int = field(default=8, metadata={"help": "decoder layers of mixed batches"})
    cases: str = field(
        default="64x1x7,16x1x15,8x128x3", metadata={"help": "SAMPLESxTOKENSxADAPTERS"}
    )
    repeats: int = field(default=7, metadata={"help": "timed rounds"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the weights"})

    def shape(self) -> Shape:
        return Shape(**{name: getattr(self, name) for name in Shape.__dataclass_fields__})


unavailable = gpu.unavailable


def run(
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cuda",
) -> dict[str, Any]:
    """Check and time; the whole JSON document of the suite. ``device``: to try it out."""
    *_, document = parts(settings, progress, device=device)
    if document["failed"]:
        raise RuntimeError(f"parts of the {NAME} suite failed: {document['failed']}")
    return document


def parts(
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Yield the document after each part, as `benchmarks.gpu.parts` does."""
    if device == "cuda" and (why := unavailable()):
        raise RuntimeError(why)
    surroundings = environment.describe()
    one = {"weight": (settings.size, settings.size)}
    work = {
        "switching, one weight": partial(_switching, one, 1, settings, device),
        "switching, all layers": partial(
            _switching, _block(settings), settings.layers, settings, device
        ),
        "masks, one weight": partial(_masks, settings, device),
        "masks, the model": partial(_adapting, settings, device),
    }
    for case in settings.cases.split(","):
        work[f"mixed batch, {case}"] = partial(_mixed, case, settings, device)
    body: dict[str, Any] = {"answers": {}, "results": {}, "failed": {}}
    for _ in gpu.in_parts(work, body, progress, device):
        yield report.document(NAME, {**asdict(settings), "device": device}, surroundings, body)


def _timed(work: Callable[[], object], device: str) -> Callable[[], Laps]:
    def once() -> Laps:
        gpu.sync(device)
        laps = Laps()
        work()
        gpu.sync(device)
        laps.mark("all")
        return laps

    return once


def _seconds(
    runs: Mapping[str, Callable[[], object]], reference: str, repeats: int, device: str
) -> dict[str, Any]:
    laps = interleave({n: _timed(w, device) for n, w in runs.items()}, repeats, warmup=1)
    walls = {name: [lap.total.wall for lap in kept] for name, kept in laps.items()}
    return {
        name: {
            "wall_seconds": {**summary(samples), "samples": samples},
            "wall_ratio": ratios(samples, walls[reference]),
        }
        for name, samples in walls.items()
    }


# --- switching ------------------------------------------------------------------------------------


def _block(settings: Settings) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: (out, in)."""
    h, i = settings.hidden, settings.intermediate
    kv = h // settings.heads * settings.kv_heads
    shapes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
    return {**shapes, "gate": (i, h), "up": (i, h), "down": (h, i)}


def _switching(
    block: dict[str, tuple[int, int]], blocks: int, settings: Settings, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    from shira.cli.switch_bench.contenders import (
        Switching,
        linear_around,
        merge_and_unmerge,
        peft_lora,
        peft_shira,
        random_adapter,
        shira_in_peft,
    )

    dtype = getattr(torch, settings.dtype)
    shapes = {f"{name}{number}": s for number in range(blocks) for name, s in block.items()}
    module = nn.Module()
    for name, shape in shapes.items():
        weight = 0.02 * torch.randn(shape, device=device, dtype=dtype)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    adapters = {name: random_adapter(shapes, settings.r, seed) for seed, name in enumerate("ab")}
    before = gpu.bits(module)
    ours = Switching(module, adapters)
    ours.switch.activate("a")
    if gpu.bits(module) == before:
        raise RuntimeError("switching changed nothing")
    ours.switch.deactivate()
    layers: dict[str, list[Any]] = {"shira in PEFT": [], "PEFT SHiRA": [], "PEFT LoRA": []}
    for name in block:
        weight, delta = module.get_parameter(f"{name}0"), adapters["a"][f"{name}0"]
        made = (
            shira_in_peft(linear_around(weight.clone()), delta),
            peft_shira(linear_around(weight.clone()), delta),
            peft_lora(linear_around(weight.clone()), settings.r),
        )
        made[1].shira_indices["default"] = made[1].shira_indices["default"].to(device)
        for (kind, kept), layer in zip(layers.items(), made, strict=True):
            del kind
            kept.append(layer.to(device))

    def each(kind: str) -> None:
        for layer in layers[kind]:
            merge_and_unmerge(layer)

    runs: dict[str, Callable[[], object]] = {
        "Switch": ours.there_and_back,
        "Switch, to the next": ours.onwards,
        **{f"{kind}, one block": partial(each, kind) for kind in layers},
    }
    seconds = _seconds(runs, "Switch", settings.repeats, device)
    ours.switch.deactivate()
    back = {"Switch": gpu.bits(module) == before}
    for kind, kept in layers.items():
        pairs = zip(kept, block, strict=True)
        back[kind] = all(
            torch.equal(layer.get_base_layer().weight, module.get_parameter(f"{name}0"))
            for layer, name in pairs
        )
    if not (back["Switch"] and back["shira in PEFT"]):
        raise RuntimeError(f"the base did not come back bit for bit: {back}")
    return {"base_came_back_bit_for_bit": back, "blocks": blocks}, seconds


# --- masks ----------------------------------------------------------------------------------------


def _masks(settings: Settings, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from peft.tuners.shira.mask_functions import random_mask

    from shira.masks import block_support, magnitude_support, random_support

    size, dtype = settings.size, getattr(torch, settings.dtype)
    shape, k = (size, size), settings.r * 2 * size
    linear = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    weight = linear.weight.detach()
    there, here = magnitude_support(weight, k), magnitude_support(weight.cpu(), k)
    if not torch.equal(there.indices.cpu(), here.indices):
        raise RuntimeError("magnitude masks on this device and on the CPU differ")
    runs: dict[str, Callable[[], object]] = {
        "random": lambda: random_support(shape, k, seed=SEED).to(weight.device),
        "block": lambda: block_support(shape, k, seed=SEED, block_size=BLOCK_SIZE).to(
            weight.device
        ),
        "magnitude": lambda: magnitude_support(weight, k),
        "PEFT random": lambda: random_mask(linear, settings.r, random_seed=SEED),
    }
    answers = {"magnitude_as_on_the_cpu": True}
    return answers, _seconds(runs, "PEFT random", settings.repeats, device)


def _adapting(settings: Settings, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``get_peft_model`` on all linear layers, mask by mask."""
    from shira import ShiraConfig, get_peft_model

    base = gpu_contenders.base_model(settings.shape(), 64, device, getattr(torch, settings.dtype))

    def adapt(**options: Any) -> None:
        get_peft_model(
            gpu_contenders.around(base),
            ShiraConfig(
                r=settings.r, target_modules=list(TARGETS["all"]), random_seed=SEED, **options
            ),
        )

    runs: dict[str, Callable[[], object]] = {
        "random": adapt,
        "block": partial(adapt, mask_type="block", mask_options={"block_size": BLOCK_SIZE}),
        "magnitude": partial(adapt, mask_type="magnitude"),
    }
    return {}, _seconds(runs, "random", 2, device)


# --- mixed batches --------------------------------------------------------------------------------


def _mixed(case: str, settings: Settings, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    samples, tokens, adapters = map(int, case.split("x"))
    names = [
        [mixed_batch.BASE, *mixed_batch._names(adapters)][i % (adapters + 1)]
        for i in range(samples)
    ]
    exact = replace(settings, dtype="float32", mixed_layers=2)
    models = _mixed_models(exact, adapters, tokens, device, ["shira"])
    inputs = _embedded(samples, tokens, exact, device)
    triton, _ = available(device, getattr(torch, settings.dtype))
    with gpu_answers.without_tf32():
        answers: dict[str, Any] = mixed_batch.check_answers(models["shira"], inputs, names)
        if triton:
            with use_backend("triton"):
                answers["triton"] = mixed_batch.check_answers(models["shira"], inputs, names)
    del models
    models = _mixed_models(settings, adapters, tokens, device, ["base", "shira", "PEFT LoRA"])
    inputs = _embedded(samples, tokens, settings, device)

    def forward(name: str) -> None:
        options = {} if name == "base" else {"adapter_names": names}
        with torch.no_grad():
            models[name](inputs_embeds=inputs, **options)

    def with_triton() -> None:
        with use_backend("triton"):
            forward("shira")

    runs: dict[str, Callable[[], None]] = {name: partial(forward, name) for name in models}
    if triton:
        runs["shira, triton"] = with_triton
    return answers, _seconds(runs, "base", settings.repeats, device)


def _embedded(samples: int, tokens: int, settings: Settings, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + 1)
    inputs = torch.randn(samples, tokens, settings.hidden, generator=generator)
    return inputs.to(device, getattr(torch, settings.dtype))


def _mixed_models(
    settings: Settings, adapters: int, tokens: int, device: str, wanted: list[str]
) -> dict[str, nn.Module]:
    from peft import LoraConfig
    from peft import get_peft_model as peft_model

    from shira import ShiraConfig, get_peft_model

    shape = replace(settings.shape(), layers=min(settings.mixed_layers, settings.layers))
    base = gpu_contenders.base_model(shape, tokens, device, getattr(torch, settings.dtype))
    all_linear, r = list(TARGETS["all"]), settings.r
    models: dict[str, nn.Module] = {}
    for wanting in wanted:
        model = gpu_contenders.around(base)
        for seed, name in enumerate(mixed_batch._names(adapters) if wanting != "base" else ()):
            if wanting == "shira":
                make: Any = get_peft_model
                config: Any = ShiraConfig(r=r, target_modules=all_linear, random_seed=seed)
            else:
                make = peft_model
                config = LoraConfig(r=r, lora_alpha=r, target_modules=all_linear)
            if seed:
                model.add_adapter(name, config)
            else:
                model = make(model, config, adapter_name=name)
        for name, parameter in model.named_parameters():
            if ".shira_weight." in name or ".lora_" in name:
                nn.init.normal_(parameter, std=0.02)
        models[wanting] = model.eval()
    return models


def tables(result: dict[str, Any]) -> list[report.Table]:
    """One table of all parts."""
    s = result["settings"]
    device = result["environment"]["cuda_device"] or s["device"]
    table = report.Table(
        f"Switching, masks, mixed batches on {device}, {s['dtype']}, r = {s['r']}",
        ["what", "ms min", "ms median", "x the part's reference, median [quartiles]"],
        notes=[
            f"{part}: base back bit for bit: "
            + ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in back.items())
            for part, found in result["answers"].items()
            if (back := found.get("base_came_back_bit_for_bit"))
        ]
        + [f"Failed: {part}: {error}" for part, error in result["failed"].items()],
    )
    for part, rows in result["results"].items():
        for name, row in rows.items():
            wall, ratio = row["wall_seconds"], row["wall_ratio"]
            table.rows.append(
                [
                    f"{part}: {name}",
                    f"{1e3 * wall['min']:.2f}",
                    f"{1e3 * wall['median']:.2f}",
                    f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                ]
            )
    return [table]
