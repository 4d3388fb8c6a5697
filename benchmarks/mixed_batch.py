# SPDX-License-Identifier: Apache-2.0
"""Suite ``mixed_batch``: one batch whose samples want different adapters (``adapter_names=``).

A forward pass of a random Llama, all linear layers adapted, each sample through the adapter it
names, by turns; one sample in (adapters + 1) wants the base. Contenders::

    floor      the base model alone, for the whole batch
    grouped    shira: the base product once, each adapter's entries on top of its own samples
    whole      shira: a product with the adapter inside the weight for each group of samples
    shira      what `adapter_names=` does: grouped for short groups, whole for long ones
    peft-lora  PEFT's LoRA with as many values, through its own `adapter_names=`

Checked before timing: the logits of every sample, by each of shira's ways, equal those of the same
sample alone with its adapter merged into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, report
from benchmarks.contenders import TARGETS, Workload, base_model
from benchmarks.timing import Laps, interleave, ratios, summary

NAME = "mixed_batch"
REFERENCE = "floor"
BASE = "__base__"
TOLERANCE = 1e-4
ALWAYS, NEVER = 2**62, 0


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    layers: int = field(default=2, metadata={"help": "decoder layers of the Llama"})
    hidden: int = field(default=1024, metadata={"help": "hidden size"})
    intermediate: int = field(default=0, metadata={"help": "size of the MLP; 0: 2.75 x hidden"})
    heads: int = field(default=8, metadata={"help": "attention heads"})
    vocab: int = field(default=512, metadata={"help": "vocabulary"})
    cases: str = field(
        default="16x1x3,16x1x15,64x1x7,8x32x3,8x128x3,8x512x1",
        metadata={"help": "SAMPLESxTOKENSxADAPTERS, comma separated; one token is decoding"},
    )
    density: float = field(default=0.02, metadata={"help": "trained share of the adapted weights"})
    dtype: str = field(default="float32", metadata={"help": "of the weights"})
    repeats: int = field(default=9, metadata={"help": "timed rounds"})
    threads: int = field(default=0, metadata={"help": "torch threads; 0: torch's own choice"})

    def workload(self) -> Workload:
        return Workload(
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate or self.hidden * 11 // 4,
            heads=self.heads,
            vocab=self.vocab,
            batch=1,
            tokens=max(tokens for _, tokens, _ in self.parsed_cases()),
            density=self.density,
            dtype=self.dtype,
        )

    def parsed_cases(self) -> list[tuple[int, int, int]]:
        cases = []
        for text in self.cases.split(","):
            samples, tokens, adapters = map(int, text.split("x"))
            cases.append((samples, tokens, adapters))
        return cases


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check and time; the whole JSON document of the suite."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    surroundings = environment.describe()
    work = settings.workload()
    most = max(adapters for _, _, adapters in settings.parsed_cases())
    progress("mixed_batch: building the models")
    models = {
        REFERENCE: base_model(work).eval(),
        "shira": _shira(work, most),
        "peft-lora": _lora(work, most),
    }
    results, answers = {}, {}
    neighbours = environment.Neighbours()
    for samples, tokens, adapters in settings.parsed_cases():
        case = f"{samples}x{tokens}x{adapters}"
        progress(f"mixed_batch: {case}, comparing the answers")
        inputs = _inputs(work, samples, tokens)
        names = [[BASE, *_names(adapters)][i % (adapters + 1)] for i in range(samples)]
        answers[case] = check_answers(models["shira"], inputs, names)
        runs = _runs(models, inputs, names)
        laps = interleave(
            runs, settings.repeats, progress=lambda text, at=case: progress(f"{at}: {text}")
        )
        wall = {name: [lap.total.wall for lap in laps[name]] for name in runs}
        results[case] = {
            name: {
                "wall_seconds": {**summary(samples), "samples": samples},
                "wall_ratio": ratios(samples, wall[REFERENCE]),
            }
            for name, samples in wall.items()
        }
    surroundings["cpu_share_of_others"] = neighbours.share()
    chosen = {**asdict(settings), "r": work.rank, "whole_product_from": _threshold()}
    return report.document(NAME, chosen, surroundings, {"answers": answers, "results": results})


def check_answers(model: nn.Module, inputs: Tensor, names: list[str]) -> dict[str, float]:
    """The largest difference from each sample alone and merged, over the largest logit.

    Raises:
        RuntimeError: If one of the ways answers otherwise.
    """
    want = torch.empty(0)
    with torch.no_grad():
        for name in dict.fromkeys(names):
            at = [i for i, other in enumerate(names) if other == name]
            if name != BASE:
                model.merge_adapter([name])
            with model.disable_adapter() if name == BASE else _nothing():
                logits = model(inputs_embeds=inputs[at]).logits
            if name != BASE:
                model.unmerge_adapter()
            want = want if want.numel() else logits.new_empty(len(names), *logits.shape[1:])
            want[at] = logits
        found = {}
        for way, threshold in (("grouped", ALWAYS), ("whole", NEVER)):
            with _whole_product_from(threshold):
                got = model(inputs_embeds=inputs, adapter_names=names).logits
            found[way] = ((got - want).abs().max() / want.abs().max()).item()
    tolerance = TOLERANCE if inputs.dtype == torch.float32 else 5e-2
    if max(found.values()) > tolerance:
        raise RuntimeError(f"the answers of a mixed batch differ from those alone: {found}")
    return {**found, "tolerance": tolerance}


def _runs(
    models: dict[str, nn.Module], inputs: Tensor, names: list[str]
) -> dict[str, Callable[[], Laps]]:
    mixed = {"adapter_names": names}
    return {
        REFERENCE: partial(_forward, models[REFERENCE], inputs, {}, None),
        "grouped": partial(_forward, models["shira"], inputs, mixed, ALWAYS),
        # in another order, so that what the model keeps of the last names is the others', as when
        # it generates
        "whole": partial(_forward, models["shira"], inputs, {"adapter_names": names[::-1]}, NEVER),
        "shira": partial(_forward, models["shira"], inputs, mixed, None),
        "peft-lora": partial(_forward, models["peft-lora"], inputs, mixed, None),
    }


def _forward(
    model: nn.Module, inputs: Tensor, options: dict[str, Any], threshold: int | None
) -> Laps:
    with torch.no_grad(), _whole_product_from(threshold):
        laps = Laps()
        model(inputs_embeds=inputs, **options)
        laps.mark("forward")
    return laps


def _threshold() -> int:
    from shira.tuner.layers import Linear

    return Linear.whole_product_from


@contextmanager
def _whole_product_from(tokens: int | None) -> Iterator[None]:
    """Tokens of a group from which it gets a product of its own; None: as it is."""
    from shira.tuner.layers import Linear

    before = Linear.whole_product_from
    Linear.whole_product_from = before if tokens is None else tokens
    try:
        yield
    finally:
        Linear.whole_product_from = before


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _names(adapters: int) -> list[str]:
    return [f"task{i}" for i in range(adapters)]


def _inputs(work: Workload, samples: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(work.seed + 1)
    return torch.randn(samples, tokens, work.hidden, generator=generator).to(
        getattr(torch, work.dtype)
    )


def _shira(work: Workload, adapters: int) -> nn.Module:
    from shira import ShiraConfig, get_peft_model

    first, *others = (
        (name, ShiraConfig(r=work.rank, target_modules=list(TARGETS), random_seed=seed))
        for seed, name in enumerate(_names(adapters))
    )
    model = get_peft_model(base_model(work), first[1], adapter_name=first[0])
    for name, config in others:
        model.add_adapter(name, config)
    return _filled(model, ".shira_weight.")


def _lora(work: Workload, adapters: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=list(TARGETS))
    first, *others = _names(adapters)
    model = get_peft_model(base_model(work), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    return _filled(model, ".lora_")


def _filled(model: nn.Module, part: str) -> nn.Module:
    """Values that do something in every adapter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The table that is printed."""
    s = result["settings"]
    first = next(iter(result["results"].values()))
    table = report.Table(
        f"Mixed batch: forward of a {s['layers']}-layer Llama, hidden {s['hidden']}, "
        f"{s['dtype']}, r = {s['r']}: times the base alone, median [quartiles]",
        ["samples x tokens x adapters", "base, ms", *(name for name in first if name != REFERENCE)],
        notes=[
            f"{s['repeats']} interleaved rounds; ratios are taken within a round. 'shira' takes "
            f"'whole' from {s['whole_product_from']} tokens of one adapter on.",
            *report.busy_note(result),
        ],
    )
    for case, rows in result["results"].items():
        cells = [f"{1e3 * rows[REFERENCE]['wall_seconds']['median']:.1f}"]
        for name, row in rows.items():
            if name != REFERENCE:
                ratio = row["wall_ratio"]
                cells.append(f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]")
        table.rows.append([case, *cells])
    return [table]
