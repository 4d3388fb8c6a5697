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
from studies.accuracy.protocol import TASKS, Run


def execute(run: Run, data: Path) -> dict[str, Any]:
    """Train and measure. A tuning run never reads the test rows.

    Returns:
        ``validation`` and, for final runs, ``test`` (in the task's metric), the trained parameters,
        the mean training loss of the last ten steps, whether it stayed finite, seconds, and hashes
        of the files of rows.
    """
    from shira.cli._demo.training import load_base

    started = time.perf_counter()
    training, validation = rows.splits(
        data, run.task, validation_rows=run.validation_rows, max_tokens=run.max_tokens
    )
    base = load_base(len(rows.label_names(data, run.task)), run.seed)
    model = adapt(base, run, lambda: list(_batches(training, run, run.calibration_batches, "mask")))
    torch.manual_seed(run.seed)  # dropout: the same draws whatever making the adapter drew
    losses = _train(model, run, _batches(training, run, run.steps, "training"))
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "metric": TASKS[run.task],
        "validation": _measure(model, validation, run.task),
        "trained": trained(model),
        "loss": _finite(sum(losses[-10:]) / len(losses[-10:])),
        "finite": all(math.isfinite(loss) for loss in losses),
        "train_seconds": round(seconds, 2),
        "train_sha256": training.sha256,
    }
    if run.stage == "final":
        test = rows.test_split(data, run.task, test_rows=run.test_rows, max_tokens=run.max_tokens)
        result["test"] = _measure(model, test, run.task)
        result["test_sha256"] = test.sha256
    result["seconds"] = round(time.perf_counter() - started, 2)
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


def _train(model: nn.Module, run: Run, batches: Iterator[dict[str, Tensor]]) -> list[float]:
    model.train()
    optimize = optimizer(model, run)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimize, lambda step: schedule(step, run))
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break  # it does not come back; what it predicts now counts
        loss.backward()
        optimize.step()
        scheduler.step()
        optimize.zero_grad(set_to_none=True)
    return losses


def _batches(split: rows.Split, run: Run, count: int, purpose: str) -> Iterator[dict[str, Tensor]]:
    """`count` batches in an order that seed and purpose decide; round and round if need be."""
    from shira.cli._demo.predict import pad

    rng = random.Random(f"{purpose} {run.seed}")
    order: list[int] = []
    for _ in range(count):
        while len(order) < run.batch_size:
            order += rng.sample(range(len(split.ids)), len(split.ids))
        chosen, order = order[: run.batch_size], order[run.batch_size :]
        batch = pad([split.ids[i] for i in chosen], pad_token_id=rows.tokenizer().pad_token_id)
        yield {**batch, "labels": torch.tensor([split.labels[i] for i in chosen])}


def _measure(model: nn.Module, split: rows.Split, task: str) -> float:
    from shira.cli._demo.predict import predict_logits

    logits = predict_logits(model, split.ids, pad_token_id=rows.tokenizer().pad_token_id)
    return round(METRICS[TASKS[task]](logits.argmax(dim=1).tolist(), split.labels), 6)


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
