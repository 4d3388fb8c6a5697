# SPDX-License-Identifier: Apache-2.0
"""One run: the same loop for every method. AdamW without weight decay, warm-up, linear decay."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.accuracy import data as rows
from studies.accuracy.methods import adapt, is_head, trained
from studies.accuracy.metrics import METRICS
from studies.accuracy.model import Classifier, predict
from studies.accuracy.model import batch as as_batch
from studies.accuracy.protocol import TASKS, Run


def execute(run: Run, data: Path) -> dict[str, Any]:
    """Train and measure: a tuning run on the validation rows, a final one on those of the test.

    Returns:
        ``validation`` or ``test`` (in the task's metric), the trained parameters, the mean training
        loss of the last ten steps, whether it stayed finite, seconds, and hashes of the files of
        rows.
    """
    started = clocks()
    training, validation = rows.splits_of(run, data)
    read = clocks()
    base = Classifier(
        len(rows.label_names(data, run.task)), frozen_blocks=run.frozen_blocks, seed=run.seed
    )
    model = adapt(base, run, lambda: list(batches(training, run, run.calibration_batches, "mask")))
    adapted = clocks()
    losses = fit(model, run, batches(training, run, run.steps, "training"))
    done = clocks()
    result: dict[str, Any] = {
        "metric": TASKS[run.task],
        "trained": trained(model),
        "loss": _finite(sum(losses[-10:]) / len(losses[-10:])),
        "finite": all(math.isfinite(loss) for loss in losses),
        "read_seconds": between(started, read),
        "adapt_seconds": between(read, adapted),
        "train_seconds": between(adapted, done),
        "train_sha256": training.sha256,
    }
    if run.stage == "final":
        test = rows.test_split_of(run, data)
        result["test"] = measure(model, test, run.task)
        result["test_sha256"] = test.sha256
    else:
        result["validation"] = measure(model, validation, run.task)
    result["seconds"] = between(started, clocks())
    return result


def optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """AdamW over what is trained; the head has a rate of its own, the same for all but ``head``."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head_rate = run.rate if run.method == "head" else run.head_rate
    groups = [
        {"params": [p for name, p in named if is_head(name)], "lr": head_rate},
        {"params": [p for name, p in named if not is_head(name)], "lr": run.rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def schedule(step: int, run: Run) -> float:
    """The share of the rate in a step: up over the warm-up, then down to zero in a line."""
    if step < run.warmup_steps:
        return (step + 1) / run.warmup_steps
    return (run.steps - step) / max(1, run.steps - run.warmup_steps)


def fit(model: nn.Module, run: Run, given: Iterator[dict[str, Tensor]]) -> list[float]:
    """Train what requires gradients on the batches given; the loss of every step."""
    model.train()
    optimize = optimizer(model, run)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimize, lambda step: schedule(step, run))
    losses = []
    for batch in given:
        loss = model(**batch).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break  # it does not come back; what it predicts now counts
        loss.backward()
        optimize.step()
        scheduler.step()
        optimize.zero_grad(set_to_none=True)
    return losses


def batches(split: rows.Split, run: Run, count: int, purpose: str) -> Iterator[dict[str, Tensor]]:
    """`count` batches in an order that seed and purpose decide; round and round if need be.

    Rows of similar length share a batch: a group of batches is drawn, sorted by length and cut.
    """
    rng = random.Random(f"{purpose} {run.seed}")
    order: list[int] = []
    made = 0
    while made < count:
        group = run.batch_size * min(run.group_batches, count - made)
        while len(order) < group:
            order += rng.sample(range(len(split.states)), len(split.states))
        chosen = sorted(order[:group], key=lambda i: len(split.states[i]))
        order = order[group:]
        starts = list(range(0, group, run.batch_size))
        rng.shuffle(starts)
        for start in starts:
            batch = chosen[start : start + run.batch_size]
            yield as_batch([split.states[i] for i in batch], [split.labels[i] for i in batch])
            made += 1


def measure(model: nn.Module, split: rows.Split, task: str) -> float:
    """The task's metric on these rows, in evaluation mode."""
    predicted = predict(model, split.states).argmax(dim=1).tolist()
    return round(METRICS[TASKS[task]](predicted, split.labels), 6)


def clocks() -> tuple[float, float]:
    """Wall clock, and seconds of this process on a processor."""
    return time.perf_counter(), time.process_time()


def between(before: tuple[float, float], after: tuple[float, float]) -> dict[str, float]:
    """What passed on either of `clocks`, in seconds."""
    wall, processor = (round(b - a, 2) for a, b in zip(before, after, strict=True))
    return {"wall": wall, "processor": processor}


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
