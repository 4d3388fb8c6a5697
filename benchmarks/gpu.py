# SPDX-License-Identifier: Apache-2.0
"""Suite ``gpu``: one training step of a random Llama-3.2-3B-shaped model in bfloat16 on a GPU.

Contenders are described in :mod:`benchmarks.gpu_contenders`; each set of targets (q and v; all
linear layers) is a comparison of its own, at equal trained parameters, r * (m + n) a layer. Where
there is no CUDA device nothing is run and nothing is written.

Checked before anything is timed (:mod:`benchmarks.gpu_answers`): two layers of the same widths in
float32 agree with PEFT's SHiRA and between backends, in logits and gradients; of the model that is
timed, untrained adapters leave the logits as they are, and merged ones give those of unmerged, bit
for bit. Afterwards: the base has the bits it had.

Memory is that of torch's CUDA allocator, one contender at a time beside the base: the peak of its
second step above the base. ``saved_inputs`` are the bytes of the distinct inputs of the adapted
layers, which an adapter has to keep: the floor plus these is the least that it can take.

Besides: the weight gradient alone, way by way (:mod:`benchmarks.gpu_kernels`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, gpu_answers, gpu_contenders, gpu_expected, gpu_kernels, report
from benchmarks.gpu_contenders import TARGETS, Contender, Shape
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "gpu"
GIB = 2**30


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
    *_, document = parts(settings, progress, device=device)
    if document["failed"]:
        raise RuntimeError(f"parts of the gpu suite failed: {document['failed']}")
    return document


def parts(
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Yield the document after each part, with what was measured until then.

    A part that fails is left out, with its error under ``failed``, and the next one begins.
    """
    if device == "cuda" and (why := unavailable()):
        raise RuntimeError(why)
    surroundings = environment.describe()
    dtype, shape = getattr(torch, settings.dtype), settings.shape()
    body: dict[str, Any] = {"answers": {}, "results": {}, "kernels": {}, "failed": {}}
    answers = body["answers"]

    def exact(which: str) -> None:
        answers[which] = {
            "exact": gpu_answers.check_exactly(
                shape, TARGETS[which], settings.r, settings.tokens, device
            )
        }

    def steps(which: str) -> None:
        if which not in answers:
            raise RuntimeError("its answers are wrong: not timed")
        progress("gpu: building the base")
        base = gpu_contenders.base_model(shape, settings.tokens, device, dtype)
        inputs = gpu_contenders.batch(shape, settings.batch, settings.tokens, device, dtype)
        before = bits(base)
        found, results = _compare(which, base, inputs, settings, progress)
        if bits(base) != before:
            raise RuntimeError("training changed the base weights")
        answers[which].update(found, base_weights_unchanged=True)
        body["results"][which] = results

    def kernels(rows: int, cols: int) -> None:
        body["kernels"][f"{rows}x{cols}"] = gpu_kernels.measure(
            (rows, cols),
            settings.r,
            settings.batch * settings.tokens,
            device,
            dtype,
            settings.repeats,
            partial(sync, device),
        )

    wide, narrow = shape.intermediate, shape.hidden
    work: dict[str, Callable[[], None]] = {}
    for rows, cols in ((narrow, narrow), (wide, narrow), (narrow, wide)):
        work[f"weight gradient of {rows} x {cols}"] = partial(kernels, rows, cols)
    for which in settings.targets.split(","):
        work[f"answers, targets {which}"] = partial(exact, which)
        work[f"steps, targets {which}"] = partial(steps, which)
    for _ in in_parts(work, body, progress, device):
        yield report.document(NAME, {**asdict(settings), "device": device}, surroundings, body)


def in_parts(
    work: Mapping[str, Callable[[], tuple[dict[str, Any], dict[str, Any]] | None]],
    body: dict[str, Any],
    progress: Callable[[str], None],
    device: str,
) -> Iterator[str]:
    """Do some parts, and yield the name of each once it is done or has failed.

    What one returns goes to ``answers`` and ``results`` of the body, an error to ``failed``.
    """
    for name, measure in work.items():
        progress(name)
        try:
            found = measure()
            if found is not None:
                body["answers"][name], body["results"][name] = found
        except Exception as error:
            body["failed"][name] = f"{type(error).__name__}: {error}"
        if device == "cuda":
            _tidy()
        yield name


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
        progress(f"gpu: {which}: peak memory of {name}")
        memory[name] = _peak_memory(name, maker, base, inputs)
    progress(f"gpu: {which}: building the contenders")
    field_of = {name: gpu_contenders.build(name, maker, base) for name, maker in makers.items()}
    progress(f"gpu: {which}: comparing the answers")
    answers = gpu_answers.check_bits(field_of, inputs)
    laps = interleave(
        {name: partial(step, contender, inputs) for name, contender in field_of.items()},
        settings.repeats,
        warmup=2,
        progress=lambda text: progress(f"gpu: {which}: {text}"),
    )
    floor = [lap.total.wall for lap in laps["floor"]]
    results: dict[str, Any] = {}
    expected = gpu_expected.steps(
        settings.shape(), which, settings.r, settings.batch, settings.tokens
    )
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
            "expected_seconds": expected.get(name),
        }
    answers["saved_inputs_bytes"] = saved_inputs(field_of["floor"].model, targets, inputs)
    return answers, results


def step(contender: Contender, inputs: dict[str, Tensor]) -> Laps:
    """One timed training step; the device is waited for at the end of each phase."""
    wait = partial(sync, inputs["labels"].device.type)
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


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bits(model: nn.Module) -> list[int]:
    """A sum over the bits of each parameter, as integers: any change of one entry shows."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        int(p.detach().view(kinds[p.element_size()]).sum(dtype=torch.int64))
        for p in model.parameters()
    ]


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
                "x floor counted",
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
        least = rows["floor"]["expected_seconds"]
        for name, row in rows.items():
            counted = row["expected_seconds"]
            wall, ratio, space = row["wall_seconds"], row["wall_ratio"], row["memory_bytes"]
            cells = ["not measured"] * 3
            if space is not None:
                needed = floor["over_base"] + (saved if name != "floor" else 0)
                cells = [
                    f"{space['resident'] / GIB:.2f}",
                    f"{space['over_base'] / GIB:.2f}",
                    f"{space['over_base'] / needed:.3f}",
                ]
            table.rows.append(
                [
                    name,
                    f"{row['trained']:,}",
                    f"{1e3 * wall['min']:.1f}",
                    f"{1e3 * wall['median']:.1f}",
                    f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]",
                    f"{counted / least:.2f}" if counted else "",
                    *cells,
                ]
            )
        made.append(table)
    kernels = report.Table(
        f"Weight gradient alone, {s['batch'] * s['tokens']} tokens",
        ["weight", "way", "ms min", "ms counted", "x dense median [quartiles]"],
        notes=["Counted: operations and bytes on an H100, see benchmarks/gpu_expected.py."],
    )
    for label, ways in result["kernels"].items():
        for way, row in ways.items():
            ratio = row["over_dense"]
            kernels.rows.append(
                [
                    label,
                    way,
                    f"{1e3 * row['wall_seconds']['min']:.3f}",
                    f"{1e3 * row['expected_seconds']:.3f}",
                    f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
                ]
            )
    kernels.notes += [f"Failed: {part}: {error}" for part, error in result["failed"].items()]
    return [*made, kernels]
