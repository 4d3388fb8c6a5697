# SPDX-License-Identifier: Apache-2.0
"""Suite ``training``: one training step of a random Llama, all linear layers adapted.

Contenders are described in :mod:`benchmarks.contenders`, peak memory in :mod:`benchmarks.memory`.
A step is forward, backward and, where something is trained, the optimizer (AdamW); the floor has
no optimizer, so its ratio for the others includes theirs. Each step stands between two of the
floor's; the floor's own ratio, which should be 1, says how well that works.

Checked before anything is timed, with the largest difference relative to the largest value:

- shira and peft-shira, given the same positions and values, agree in the logits and the loss, in
  the gradient of every layer's values, and in the gradient of the inputs;
- untrained, every contender has the floor's logits;
- all adapters train the same number of values.

Checked afterwards: the base weights of every contender are bit for bit the floor's (but for
``full``, whose base is what it trains).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders, environment, memory, report
from benchmarks.contenders import REFERENCE, Contender, Workload
from benchmarks.timing import Lap, Laps, flank, keep_freed_memory, ratios, summary

NAME = "training"
TOLERANCE = 1e-4
COMPARED = ("untrained_logits", "logits", "loss", "input_gradient", "value_gradients")
MIB = 2**20


@dataclass
class Settings:
    """The options of the suite; the command line is made from these."""

    layers: int = field(default=2, metadata={"help": "decoder layers of the Llama"})
    hidden: int = field(default=1024, metadata={"help": "hidden size"})
    intermediate: int = field(default=0, metadata={"help": "size of the MLP; 0: 2.75 x hidden"})
    heads: int = field(default=8, metadata={"help": "attention heads"})
    vocab: int = field(default=2048, metadata={"help": "vocabulary"})
    batch: int = field(default=4, metadata={"help": "sequences in a batch"})
    tokens: int = field(default=256, metadata={"help": "tokens in a sequence"})
    density: float = field(default=0.02, metadata={"help": "trained share of the adapted weights"})
    repeats: int = field(default=15, metadata={"help": "timed rounds"})
    threads: int = field(default=0, metadata={"help": "torch threads; 0: torch's own choice"})
    memory: bool = field(default=True, metadata={"help": "measure peak memory too"})
    contenders: str = field(
        default=",".join(contenders.DEFAULT), metadata={"help": "names, separated by commas"}
    )

    def names(self) -> list[str]:
        chosen = self.contenders.split(",")
        for name in chosen:
            if name not in contenders.BUILDERS:
                raise SystemExit(f"no contender {name!r}; known: {', '.join(contenders.BUILDERS)}")
        return list(dict.fromkeys([REFERENCE, *chosen]))

    def workload(self) -> Workload:
        chosen = {f.name: getattr(self, f.name) for f in fields(Workload) if hasattr(self, f.name)}
        chosen["intermediate"] = self.intermediate or self.hidden * 11 // 4
        return Workload(**chosen)


def run(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Check, time and measure; the whole JSON document of the suite."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    surroundings = {**environment.describe(), "freed_memory": keep_freed_memory()}
    work = settings.workload()
    progress("training: building the contenders")
    field_of = contenders.build_all(work, settings.names())
    inputs = contenders.batch(work)

    progress("training: comparing the answers")
    answers = check_answers(field_of, inputs)
    neighbours = environment.Neighbours()
    laps, floors = flank(
        {name: partial(step, contender, inputs) for name, contender in field_of.items()},
        REFERENCE,
        settings.repeats,
        progress=lambda text: progress(f"training: {text}"),
    )
    surroundings["cpu_share_of_others"] = neighbours.share()
    answers["base_weights_equal_bit_for_bit"] = check_base(field_of)
    results = {
        name: _figures(field_of[name], laps[name], floors[name], laps[REFERENCE])
        for name in field_of
    }

    del field_of
    for name in results if settings.memory else ():
        progress(f"training: peak memory of {name}")
        results[name]["memory_bytes"] = memory.measure_apart(name, work)
    chosen = {
        **asdict(settings),
        **asdict(work),
        "r": work.rank,
        "adapted_entries": work.adapted_entries,
        "density_reached": work.trained_entries / work.adapted_entries,
    }
    return report.document(NAME, chosen, surroundings, {"answers": answers, "results": results})


def step(contender: Contender, inputs: dict[str, Tensor]) -> Laps:
    """One timed training step; gradients are dropped at its end, as ``zero_grad`` would."""
    laps = Laps()
    loss = contender.forward(inputs)
    laps.mark("forward")
    loss.backward()
    laps.mark("backward")
    contender.update()
    laps.mark("optimizer")
    inputs["inputs_embeds"].grad = None
    return laps


def check_answers(field_of: dict[str, Contender], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare the contenders and leave their adapters filled; the largest relative differences.

    Raises:
        RuntimeError: If any two answers that should agree do not.
    """
    found: dict[str, Any] = {"tolerance": TOLERANCE}
    floor = field_of[REFERENCE].logits(inputs)
    found["untrained_logits"] = max(
        _difference(field_of[name].logits(inputs), floor) for name in field_of if name != REFERENCE
    )
    adapters = [name for name in field_of if name not in (REFERENCE, "full")]
    counts = {name: sum(p.numel() for p in field_of[name].trained) for name in adapters}
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"the adapters train different numbers of values: {counts}")

    for name in adapters:
        contenders.fill(field_of[name])
    if not {"shira", "peft-shira"} <= set(adapters):
        return found
    ours = _loss_and_gradients(field_of["shira"], inputs)
    theirs = _loss_and_gradients(field_of["peft-shira"], inputs)
    logits = field_of["shira"].logits(inputs)
    found["logits"] = _difference(logits, field_of["peft-shira"].logits(inputs))
    found["loss"] = _difference(ours[0], theirs[0])
    found["input_gradient"] = _difference(ours[1], theirs[1])
    found["value_gradients"] = max(
        _difference(a, b) for a, b in zip(ours[2], theirs[2], strict=True)
    )
    found["values_move_logits_by"] = _difference(logits, floor)
    wrong = {name: found[name] for name in COMPARED if not found[name] <= TOLERANCE}
    if wrong:
        raise RuntimeError(f"the contenders' answers differ by more than {TOLERANCE}: {wrong}")
    if not found["values_move_logits_by"] > 10 * TOLERANCE:
        raise RuntimeError("the values do not move the logits: the comparison says nothing")
    return found


def check_base(field_of: dict[str, Contender]) -> bool:
    """True when every contender's base is bit for bit the floor's; an error otherwise."""
    reference = contenders.base_weights(field_of[REFERENCE])
    for name, contender in field_of.items():
        if name == "full":
            continue
        pairs = zip(contenders.base_weights(contender), reference, strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise RuntimeError(f"training changed the base weights of {name}")
    return True


def _loss_and_gradients(
    contender: Contender, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    loss = contender.forward(inputs)
    x = inputs["inputs_embeds"]
    of_inputs, *of_values = torch.autograd.grad(loss, [x, *contender.trained])
    return loss.detach(), of_inputs, of_values


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference over the largest absolute value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()


def _figures(
    contender: Contender, laps: list[Laps], floors: list[Lap], floor: list[Laps]
) -> dict[str, Any]:
    """``floors`` stand beside ``laps``, each a mean of two; ``floor`` are single runs, as many."""
    wall, cpu = [lap.total.wall for lap in laps], [lap.total.cpu for lap in laps]
    return {
        "trained": sum(p.numel() for p in contender.trained),
        "wall_seconds": {**summary(wall), "samples": wall},
        "cpu_seconds": {**summary(cpu), "samples": cpu},
        "phase_wall_seconds": {
            phase: summary([lap.phases[phase].wall for lap in laps]) for phase in laps[0].phases
        },
        # the least of some means is more than the least single run: minima by single runs
        "wall_ratio": {
            **ratios(wall, [lap.wall for lap in floors]),
            "of_min": min(wall) / min(lap.total.wall for lap in floor),
        },
        "cpu_ratio": {
            **ratios(cpu, [lap.cpu for lap in floors]),
            "of_min": min(cpu) / min(lap.total.cpu for lap in floor),
        },
        "memory_bytes": None,
    }


def tables(result: dict[str, Any]) -> list[report.Table]:
    """The tables that are printed."""
    s = result["settings"]
    title = (
        f"Training step, {s['layers']}-layer Llama, hidden {s['hidden']}, "
        f"{s['batch']} x {s['tokens']} tokens, {s['dtype']}, r = {s['r']} "
        f"({100 * s['density_reached']:.2f} % of all linear layers)"
    )
    time = report.Table(
        title,
        [
            "contender",
            "trained",
            "ms min",
            "ms median",
            "x floor of min",
            "x floor median [95 %]",
            "cpu x floor",
        ],
        notes=[
            f"{s['repeats']} interleaved rounds; each step between two of the floor, "
            "whose mean it is compared with; in brackets what the median is known to. "
            "Answers that should agree do so to "
            f"{max(result['answers'].get(name, 0) for name in COMPARED):.1e}.",
            *report.busy_note(result),
        ],
    )
    for name, row in result["results"].items():
        wall, ratio = row["wall_seconds"], row["wall_ratio"]
        time.rows.append(
            [
                name,
                f"{row['trained']:,}",
                f"{1e3 * wall['min']:.1f}",
                f"{1e3 * wall['median']:.1f}",
                f"{ratio['of_min']:.3f}",
                f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
                f"{row['cpu_ratio']['median']:.3f}",
            ]
        )
    measured = {n: r["memory_bytes"] for n, r in result["results"].items() if r["memory_bytes"]}
    if not measured:
        return [time]
    space = report.Table(
        "Peak memory of that step, MiB (times the floor)",
        ["contender", "adapter memory", "step, resident", "step, allocator", "all above the base"],
    )
    for name, row in measured.items():
        floor = measured[REFERENCE]
        space.rows.append(
            [
                name,
                _mib(row["rss"]["resident"]),
                _mib(row["rss"]["step"], floor["rss"]["step"]),
                _mib(row["allocator"]["step"], floor["allocator"]["step"]),
                _mib(row["rss"]["over_base"], floor["rss"]["over_base"]),
            ]
        )
    return [time, space]


def _mib(size: int | None, floor: int | None = None) -> str:
    if size is None:
        return "not measured"
    text = f"{size / MIB:.1f}"
    return f"{text} ({size / floor:.3f})" if floor else text
