# SPDX-License-Identifier: Apache-2.0
"""Suite ``gpu``: one training step of a random Llama-3.2-3B-shaped model in bfloat16 on a GPU.

Contenders are described in :mod:`benchmarks.gpu_contenders`; each set of targets (q and v; all
linear layers) is a comparison of its own, at equal trained parameters, r * (m + n) a layer. Where
there is no CUDA device nothing is run and nothing is written.

Checked before anything is timed: ``shira`` and ``peft-shira``, given the same positions and values,
agree in logits, loss, value gradients and input gradient as far as bfloat16 can; ``shira`` and
``shira-block`` give the same logits bit for bit whether merged or not; every other backend gives
the gradients of the chosen one; untrained, every contender has the floor's logits. Afterwards: the
base has the bits it had.

Memory is that of torch's CUDA allocator, one contender at a time beside the base: the peak of its
second step above the base. ``saved_inputs`` are the bytes of the distinct inputs of the adapted
layers, which an adapter has to keep: the floor plus these is the least that it can take.

Besides: the weight gradient alone, way by way (:mod:`benchmarks.gpu_kernels`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, gpu_contenders, gpu_kernels, report
from benchmarks.gpu_contenders import TARGETS, Contender, Shape
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "gpu"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # PEFT rounds its sums of bfloat16 otherwise
GIB = 2**30
COMPARED = ("logits", "loss", "value_gradients", "input_gradient")


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    layers: int = field(default=Shape.layers, metadata={"help": "decoder layers"})
    hidden: int = field(default=Shape.hidden, metadata={"help": "hidden size"})
    intermediate: int = field(default=Shape.intermediate, metadata={"help": "size of the MLP"})
    heads: int = field(default=Shape.heads, metadata={"help": "attention heads"})
    kv_heads: int = field(default=Shape.kv_heads, metadata={"help": "key and value heads"})
    vocab: int = field(default=Shape.vocab, metadata={"help": "vocabulary"})
    batch: int = field(default=4, metadata={"help": "sequences in a batch"})
    tokens: int = field(default=512, metadata={"help": "tokens in a sequence"})
    r: int = field(default=32, metadata={"help": "r * (m + n) trained values a layer"})
    targets: str = field(default="qv,all", metadata={"help": "sets of targets: qv, all"})
    repeats: int = field(default=15, metadata={"help": "timed rounds"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the base"})

    def shape(self) -> Shape:
        return Shape(**{name: getattr(self, name) for name in Shape.__dataclass_fields__})


def unavailable() -> str | None:
    """Why the suite cannot run here; None if it can."""
    if torch.cuda.is_available():
        return None
    return "the gpu suite needs a CUDA device, and torch sees none; nothing was written"


def run(
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cuda",
) -> dict[str, Any]:
    """Check, time and measure; the whole JSON document of the suite.

    ``device`` is for trying the suite out: elsewhere than on a GPU its figures mean nothing, and
    memory is null.
    """
    if device == "cuda" and (why := unavailable()):
        raise RuntimeError(why)
    surroundings = environment.describe()
    dtype, shape = getattr(torch, settings.dtype), settings.shape()
    progress("gpu: building the base")
    base = gpu_contenders.base_model(shape, settings.tokens, device, dtype)
    inputs = gpu_contenders.batch(shape, settings.batch, settings.tokens, device, dtype)
    before = _bits(base)
    answers, results = {}, {}
    for which in settings.targets.split(","):
        answers[which], results[which] = _compare(
            which, base, inputs, settings, lambda text, at=which: progress(f"gpu: {at}: {text}")
        )
    if _bits(base) != before:
        raise RuntimeError("training changed the base weights")
    answers["base_weights_unchanged"] = True
    del base
    kernels = {}
    for rows, cols in (
        (shape.hidden, shape.hidden),
        (shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ):
        progress(f"gpu: weight gradient of {rows} x {cols}")
        kernels[f"{rows}x{cols}"] = gpu_kernels.measure(
            (rows, cols),
            settings.r,
            settings.batch * settings.tokens,
            device,
            dtype,
            settings.repeats,
            partial(_sync, device),
        )
    return report.document(
        NAME,
        {**asdict(settings), "device": device},
        surroundings,
        {"answers": answers, "results": results, "kernels": kernels},
    )


def _compare(
    which: str,
    base: nn.Module,
    inputs: dict[str, Tensor],
    settings: Settings,
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    device = inputs["labels"].device.type
    targets = TARGETS[which]
    backends = gpu_contenders.other_backends(device, inputs["inputs_embeds"].dtype, 0.02)
    makers = gpu_contenders.makers(base, targets, settings.r, backends)
    memory = {}
    for name, maker in makers.items():
        progress(f"peak memory of {name}")
        memory[name] = _peak_memory(name, maker, base, inputs)
    progress("building the contenders")
    field_of = {name: gpu_contenders.build(name, maker, base) for name, maker in makers.items()}
    progress("comparing the answers")
    answers = check_answers(field_of, inputs)
    laps = interleave(
        {name: partial(step, contender, inputs) for name, contender in field_of.items()},
        settings.repeats,
        warmup=3,
        progress=progress,
    )
    floor = [lap.total.wall for lap in laps["floor"]]
    results: dict[str, Any] = {}
    for name, contender in field_of.items():
        walls = [lap.total.wall for lap in laps[name]]
        results[name] = {
            "trained": sum(p.numel() for p in contender.trained),
            "wall_seconds": {**summary(walls), "samples": walls},
            "phase_wall_seconds": {
                phase: summary([lap.phases[phase].wall for lap in laps[name]])
                for phase in laps[name][0].phases
            },
            "wall_ratio": ratios(walls, floor),
            "memory_bytes": memory[name],
        }
    answers["saved_inputs_bytes"] = saved_inputs(field_of["floor"].model, targets, inputs)
    return answers, results


def step(contender: Contender, inputs: dict[str, Tensor]) -> Laps:
    """One timed training step; the device is waited for at the end of each phase."""
    wait = partial(_sync, inputs["labels"].device.type)
    with contender.at_work():
        wait()
        laps = Laps()
        loss = contender.model(**inputs).loss
        wait()
        laps.mark("forward")
        loss.backward()
        wait()
        laps.mark("backward")
        if contender.optimizer is not None:
            contender.optimizer.step()
            contender.optimizer.zero_grad(set_to_none=True)
        wait()
        laps.mark("optimizer")
    inputs["inputs_embeds"].grad = None
    return laps


def check_answers(field_of: dict[str, Contender], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare the contenders and leave their adapters filled; the largest relative differences.

    Raises:
        RuntimeError: If any two answers that should agree do not.
    """
    tolerance = TOLERANCE[str(inputs["inputs_embeds"].dtype).removeprefix("torch.")]
    found: dict[str, Any] = {"tolerance": tolerance}
    floor = _logits(field_of["floor"], inputs)
    found["untrained_logits"] = max(
        _difference(_logits(contender, inputs), floor) for contender in field_of.values()
    )
    counts = {name: sum(p.numel() for p in c.trained) for name, c in field_of.items()}
    if len({count for name, count in counts.items() if name != "floor"}) != 1:
        raise RuntimeError(f"the adapters train different numbers of values: {counts}")
    for contender in field_of.values():
        gpu_contenders.fill(contender)
    ours = _loss_and_gradients(field_of["shira"], inputs)
    for name, contender in field_of.items():
        if name != "peft-shira" and not contender.environment:
            continue
        theirs = _loss_and_gradients(contender, inputs)
        differences = {
            "logits": _difference(_logits(field_of["shira"], inputs), _logits(contender, inputs)),
            "loss": _difference(ours[0], theirs[0]),
            "input_gradient": _difference(ours[1], theirs[1]),
            "value_gradients": max(map(_difference, ours[2], theirs[2])),
        }
        found[f"shira against {name}"] = differences
    moved = _logits(field_of["shira"], inputs)
    found["values_move_logits_by"] = _difference(moved, floor)
    for name in ("shira", "shira-block"):
        contender = field_of[name]
        unmerged = _logits(contender, inputs)
        contender.model.merge_adapter()
        merged = _logits(contender, inputs)
        contender.model.unmerge_adapter()
        if not torch.equal(unmerged, merged):
            raise RuntimeError(f"{name}: merged and unmerged logits differ")
    found["merged_equals_unmerged"] = True
    wrong = {
        pair: kinds
        for pair, kinds in found.items()
        if isinstance(kinds, dict) and not all(kinds[kind] <= tolerance for kind in COMPARED)
    }
    if wrong or not found["untrained_logits"] <= tolerance:
        raise RuntimeError(f"the contenders' answers differ by more than {tolerance}: {found}")
    apart = max(kinds["logits"] for kinds in found.values() if isinstance(kinds, dict))
    if not found["values_move_logits_by"] > 2 * apart:
        raise RuntimeError(
            f"the values hardly move the logits: the comparison says little: {found}"
        )
    return found


def saved_inputs(model: nn.Module, targets: tuple[str, ...], inputs: dict[str, Tensor]) -> int:
    """Bytes of the distinct inputs of the target layers in one forward."""
    seen: dict[int, Tensor] = {}  # held, so that no memory is handed out twice

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[args[0].data_ptr()] = args[0].detach()

    handles = [
        module.register_forward_pre_hook(note)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _peak_memory(
    name: str, maker: Any, base: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, int] | None:
    """Bytes above the base: of the adapter alone, and the peak of its second step."""
    if inputs["labels"].device.type != "cuda":
        return None
    _tidy()
    before = torch.cuda.memory_allocated()
    contender = gpu_contenders.build(name, maker, base)
    resident = torch.cuda.memory_allocated() - before
    step(contender, inputs)
    torch.cuda.reset_peak_memory_stats()
    step(contender, inputs)
    peak = torch.cuda.max_memory_allocated() - before
    del contender
    _tidy()
    return {"resident": resident, "over_base": peak}


def _tidy() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _bits(model: nn.Module) -> list[int]:
    """A sum over the bits of each parameter, as integers: any change of one entry shows."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        int(p.detach().view(kinds[p.element_size()]).sum(dtype=torch.int64))
        for p in model.parameters()
    ]


def _logits(contender: Contender, inputs: dict[str, Tensor]) -> Tensor:
    """Of the last positions, (batch, 8, vocab)."""
    with torch.no_grad(), contender.at_work():
        return contender.model(inputs_embeds=inputs["inputs_embeds"], logits_to_keep=8).logits


def _loss_and_gradients(
    contender: Contender, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with contender.at_work():
        loss = contender.model(**inputs).loss
        x = inputs["inputs_embeds"]
        of_inputs, *of_values = torch.autograd.grad(loss, [x, *contender.trained])
    return loss.detach(), of_inputs, of_values


def _difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm of ``b``."""
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm())


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    s = result["settings"]
    device = result["environment"]["cuda_device"] or s["device"]
    made = []
    for which, rows in result["results"].items():
        saved = result["answers"][which]["saved_inputs_bytes"]
        table = report.Table(
            f"Training step on {device}, {s['layers']}-layer Llama, hidden {s['hidden']}, "
            f"{s['batch']} x {s['tokens']} tokens, {s['dtype']}, r = {s['r']}, targets: {which}",
            [
                "contender",
                "trained",
                "ms min",
                "ms median",
                "x floor median [quartiles]",
                "GiB of the adapter",
                "GiB peak over the base",
                "x (floor + saved inputs)",
            ],
            notes=[
                f"Inputs of the adapted layers: {saved / GIB:.2f} GiB. "
                f"{s['repeats']} interleaved rounds; ratios are taken within a round."
            ],
        )
        floor = rows["floor"]["memory_bytes"]
        for name, row in rows.items():
            wall, ratio, space = row["wall_seconds"], row["wall_ratio"], row["memory_bytes"]
            cells = ["not measured"] * 3
            if space is not None:
                least = floor["over_base"] + (saved if name != "floor" else 0)
                cells = [
                    f"{space['resident'] / GIB:.2f}",
                    f"{space['over_base'] / GIB:.2f}",
                    f"{space['over_base'] / least:.3f}",
                ]
            table.rows.append(
                [
                    name,
                    f"{row['trained']:,}",
                    f"{1e3 * wall['min']:.1f}",
                    f"{1e3 * wall['median']:.1f}",
                    f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]",
                    *cells,
                ]
            )
        made.append(table)
    kernels = report.Table(
        f"Weight gradient alone, {s['batch'] * s['tokens']} tokens",
        ["weight", "way", "ms min", "x dense median [quartiles]"],
    )
    for label, ways in result["kernels"].items():
        for way, row in ways.items():
            ratio = row["over_dense"]
            kernels.rows.append(
                [
                    label,
                    way,
                    f"{1e3 * row['wall_seconds']['min']:.3f}",
                    f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                ]
            )
    return [*made, kernels]
