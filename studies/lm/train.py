# SPDX-License-Identifier: Apache-2.0
"""Runs: adapt, train and measure; the same loop for every method, on a CPU or a GPU.

AdamW without weight decay, warm-up over a tenth of the steps and then a line down to zero. Nothing
in the loop waits for the device.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from studies.lm import base as bases
from studies.lm import data as texts
from studies.lm.methods import ADAPTER, Adapted, adapt
from studies.lm.protocol import (
    CALIBRATION_BATCHES,
    RENEWED_AT,
    RENEWED_SHARE,
    SETS,
    SOURCE,
    STRENGTHS,
    Run,
)
from studies.lm.renew import EntryAdamW, candidates, renew

EVALUATED_AT_ONCE = {"cpu": 1024, "cuda": 8192}  # tokens
BEFORE_CAPTURE = 2  # steps


def execute(runs: Sequence[Run], data: Path, base_folder: Path) -> list[dict[str, Any]]:
    """Adapt the base in `base_folder`, train, and measure. A tuning run never reads a test file.

    On a GPU the runs' steps overlap; elsewhere they are made in turn.

    Returns:
        For each run ``target`` and ``source``: the loss (mean negative log-likelihood of a token,
        in nats; for questions of the right answer's; None where it is not finite) on validation
        rows or, for final runs, test rows; ``..._before`` of the base; for questions ``accuracy``
        by set, and before; for final runs ``strengths``, both losses by share of the adapter; the
        trained parameters, the training loss of the last ten steps, seconds, hashes.
    """
    started = time.perf_counter()
    tokenizer = bases.tokenizer(base_folder)
    torch.backends.cuda.matmul.allow_tf32 = True  # where weights are float32
    trainings, before = [], []
    for run in runs:
        # training everything in bfloat16 would lose small steps
        dtype = "float32" if run.method == "full" else run.dtype
        base = bases.load(base_folder, run.device, dtype)
        before.append(_measured_before(base, data, tokenizer, run.target, _measure_of(run)))
        torch.manual_seed(run.seed)
        mask_batches = functools.partial(_drawn, run, data, tokenizer, "mask", CALIBRATION_BATCHES)
        adapted = adapt(copy.deepcopy(base), run, mask_batches)
        batches = texts.batches(run, data, tokenizer, "training", run.steps)
        trainings.append(Training(adapted, run, batches))
    beginning = time.perf_counter()
    losses = fit(trainings)
    seconds = (time.perf_counter() - beginning) / len(runs)
    results = []
    for run, training, last, base_result in zip(runs, trainings, losses, before, strict=True):
        part = "test" if run.stage == "final" else "train"
        results.append(
            {
                **measure(training.model, data, tokenizer, run),
                **{f"{name}_before": value for name, value in base_result.items()},
                "trained": training.adapted.trained,
                "loss": _finite(sum(last[-10:]) / len(last[-10:])),
                "train_seconds": round(seconds, 2),
                "base_sha256": bases.digest(base_folder),
                "files": {name: texts.hashes(data, name, part) for name in (run.target, SOURCE)},
            }
        )
        if run.stage == "final":
            strengths = results[-1]["strengths"] = {}
            for strength in STRENGTHS:
                with training.at(strength):
                    found = measure(training.model, data, tokenizer, run)
                strengths[str(strength)] = [found["target"], found["source"]]
    del trainings, training
    gc.collect()  # an adapted model refers to itself
    for result in results:
        result["seconds"] = round((time.perf_counter() - started) / len(runs), 2)
    return results


def _drawn(
    run: Run, data: Path, tokenizer: Any, purpose: str, count: int
) -> list[dict[str, Tensor]]:
    made = texts.batches(run, data, tokenizer, purpose, count)
    return [{k: v.to(run.device) for k, v in batch.items()} for batch in made]


class Training:
    """A model in training, a step at a time.

    On a GPU a step is captured as a graph when some have been made, and replayed from then on; each
    training has a stream of its own. A step before it that chooses positions anew ends the graph.
    """

    def __init__(self, adapted: Adapted, run: Run, batches: Sequence[dict[str, Tensor]]) -> None:
        self.adapted, self.run, self.model = adapted, run, adapted.model.train()
        on_gpu = run.device == "cuda"
        self.batches = _of_one_length(batches, run.device) if on_gpu else batches
        self.batch = {name: value.clone() for name, value in self.batches[0].items()}
        _causal(self.batch["input_ids"])  # one for all streams, made before they begin
        self.share = torch.zeros((), device=run.device)
        self.rates = [torch.zeros((), device=run.device) for _ in adapted.groups]
        groups = [
            {**group, "lr": rate} for group, rate in zip(adapted.groups, self.rates, strict=True)
        ]
        self.warmup = max(1, run.steps // 10)
        self.optimizer: torch.optim.Optimizer
        if adapted.optimizer is not None:
            self.optimizer = adapted.optimizer
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
        elif adapted.renewed:
            self.optimizer = EntryAdamW(groups, warmup_steps=self.warmup)
        else:
            self.optimizer = torch.optim.AdamW(
                groups, weight_decay=0.0, fused=on_gpu or None, capturable=on_gpu
            )
        self.renewals = {int(at * run.steps) for at in RENEWED_AT} if adapted.renewed else set()
        self.losses = torch.zeros(run.steps, device=run.device)
        self.first = {
            name: p.detach().clone()
            for name, p in adapted.model.named_parameters()
            if p.requires_grad
        }
        # PEFT's SHiRA makes a sparse tensor, which looks at its entries
        self.captured = on_gpu and run.method != "peft-shira"
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.alike = 0  # steps since positions were chosen

    def advance(self, number: int) -> None:
        """Make the step of this number, or tell the device to."""
        with torch.cuda.stream(self.stream):
            if self.stream is None:
                self.batch = self.batches[number]
            else:
                for name, value in self.batch.items():
                    value.copy_(self.batches[number][name])
            warm, late = min(1, (number + 1) / self.warmup), max(0, number - self.warmup)
            self.share.fill_(warm * (1 - late / (self.run.steps - self.warmup)))
            if number in self.renewals:
                self.alike, self.graph = 0, None
                loss = self.step(renewing=True)
            elif not self.captured or self.alike < BEFORE_CAPTURE:
                self.alike += 1
                loss = self.step()
            else:
                if self.graph is None:
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph, stream=self.stream):
                        self.loss = self.step()
                self.graph.replay()
                loss = self.loss
            self.losses[number].copy_(loss)

    def step(self, *, renewing: bool = False) -> Tensor:
        """Make a step; the loss before it."""
        for group, rate in zip(self.adapted.groups, self.rates, strict=True):
            torch.mul(self.share, self.run.rate * group["factor"], out=rate)
        watched = candidates(self.model, ADAPTER, RENEWED_SHARE) if renewing else nullcontext({})
        with watched as grown:
            loss: Tensor = self.model(
                **self.batch, attention_mask=_causal(self.batch["input_ids"]), use_cache=False
            ).loss
            loss.backward()
        self.optimizer.step()
        if renewing:
            assert isinstance(self.optimizer, EntryAdamW)
            renew(self.model, ADAPTER, self.optimizer, grown)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Give the adapter so much of its strength: what is added to the weights, linearly."""
        trained = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad and ".lora_A." not in name
        }
        kept = {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for name, p in trained.items():
                p.lerp_(self.first[name], 1 - strength)
        yield
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(kept[name])


def fit(trainings: Sequence[Training]) -> list[list[float]]:
    """Train, all of them step by step on a GPU, else one after another; each one's losses."""
    if any(training.stream for training in trainings):
        torch.cuda.synchronize()
        for number in range(max(training.run.steps for training in trainings)):
            for training in trainings:
                if number < training.run.steps:
                    training.advance(number)
        torch.cuda.synchronize()
    else:
        for training in trainings:
            for number in range(training.run.steps):
                training.advance(number)
    for training in trainings:
        training.graph = None
    return [training.losses.tolist() for training in trainings]


def _of_one_length(batches: Sequence[dict[str, Tensor]], device: str) -> list[dict[str, Tensor]]:
    """Batches padded to the longest of them, on the device."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 0, "labels": texts.IGNORED}
    return [
        {
            name: pad(value, (0, longest - value.shape[1]), value=fill[name]).to(device)
            for name, value in batch.items()
        }
        for batch in batches
    ]


@functools.lru_cache(maxsize=64)
def _triangle(length: int, device: torch.device) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()


def _causal(ids: Tensor) -> Tensor:
    """The mask that a model makes itself, for which it would look at its inputs in every step."""
    return _triangle(ids.shape[1], ids.device)


def measure(model: nn.Module, data: Path, tokenizer: Any, run: Run) -> dict[str, Any]:
    """Loss on target and source, and accuracy on questions."""
    found: dict[str, Any] = {}
    for part, name in (("target", run.target), ("source", SOURCE)):
        rows = texts.measured(run, data, tokenizer, name)
        losses = row_losses(model, rows, run.device)
        if rows.of is None or rows.right is None:
            found[part] = _finite(sum(losses) / len(losses))
            continue
        best: dict[tuple[str, int], tuple[float, bool]] = {}
        for of, loss, right in zip(rows.of, losses, rows.right, strict=True):
            best[of] = min(best.get(of, (math.inf, False)), (loss, right))
        rights = [loss for loss, right in zip(losses, rows.right, strict=True) if right]
        found[part] = _finite(sum(rights) / len(rights))
        for name in SETS:
            hits = [right for (of, _), (_, right) in best.items() if of == name]
            found.setdefault("accuracy", {})[name] = round(sum(hits) / len(hits), 4)
    return found


@torch.no_grad()
def row_losses(model: nn.Module, rows: texts.Rows, device: str) -> list[float]:
    """The mean negative log-likelihood of each row's predicted tokens, in nats."""
    model.eval()
    order = sorted(range(len(rows.ids)), key=lambda i: len(rows.ids[i]))
    parts, at = [], 0
    while at < len(order):
        size = 1
        while at + size < len(order) and (
            (size + 1) * len(rows.ids[order[at + size]]) <= EVALUATED_AT_ONCE[device]
        ):
            size += 1
        batch = texts.padded(rows, order[at : at + size])
        ids, labels = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device)
        logits = model(input_ids=ids, attention_mask=_causal(ids), use_cache=False).logits
        # row by row: the logits of a batch in float32, transposed, take ten times as long on a CPU
        sums = [
            cross_entropy(row[:-1].float(), wanted, ignore_index=texts.IGNORED, reduction="sum")
            for row, wanted in zip(logits, labels, strict=True)
        ]
        parts.append(torch.stack(sums) / (labels != texts.IGNORED).sum(1))
        at += size
    by_length = torch.cat(parts).tolist()
    return [loss for _, loss in sorted(zip(order, by_length, strict=True))]


def _measure_of(run: Run) -> Run:
    """All that a measurement of the base depends on, in a run of its own."""
    fields = {**vars(run), "method": "base", "size": None, "rate_exponent": 0, "seed": 0}
    return Run(**fields)


@functools.lru_cache
def _measured_before(
    base: nn.Module, data: Path, tokenizer: Any, target: str, run: Run
) -> dict[str, Any]:
    return measure(base, data, tokenizer, run)


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
