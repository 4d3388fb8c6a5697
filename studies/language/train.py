# SPDX-License-Identifier: Apache-2.0
"""One run: the same loop for every method. AdamW without weight decay, warm-up, linear decay."""

from __future__ import annotations

import functools
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from studies.language import base as bases
from studies.language import data as texts
from studies.language.methods import adapt, trained
from studies.language.protocol import BASE, Base, Run


def execute(run: Run, data: Path, made: bases.Made, base: Base = BASE) -> dict[str, Any]:
    """Adapt the base, and measure. A tuning run never reads a test text.

    Returns:
        The loss (mean negative log-likelihood of a token, in nats; None where it is not finite) on
        validation windows of target and source or, for final runs, on their test windows, after
        training and, as ``..._before``, of the base; the trained parameters, the mean training loss
        of the last ten steps, seconds, and hashes.
    """
    started = time.perf_counter()
    target = texts.training(
        data,
        run.target,
        made.tokenizer,
        window=base.window,
        block_windows=base.block_windows,
        validation=run.validation_windows,
    )
    source = bases.source(data, made.tokenizer, base, validation=run.validation_windows)
    windows = {"target_validation": target.validation, "source_validation": source.validation}
    hashes = {"target_train_sha256": target.sha256, "source_train_sha256": source.sha256}
    if run.stage == "final":
        windows = {}
        for part, name in (("target", run.target), ("source", base.source)):
            windows[f"{part}_test"], hashes[f"{part}_test_sha256"] = texts.test_windows(
                data, name, made.tokenizer, window=base.window, count=run.test_windows
            )
    model = bases.load(made, base)
    before = {f"{part}_before": _loss_before(made, base, text) for part, text in windows.items()}
    torch.manual_seed(run.seed)
    rng = random.Random(f"mask {run.seed}")
    model = adapt(
        model, run, lambda: [_batch(target, run, base, rng) for _ in range(run.calibration_batches)]
    )
    training = time.perf_counter()
    losses = _train(model, run, base, target)
    seconds = time.perf_counter() - training
    after = {part: _loss(model, text) for part, text in windows.items()}
    return {
        **after,
        **before,
        "trained": trained(model),
        "loss": _finite(sum(losses[-10:]) / len(losses[-10:])),
        "train_seconds": round(seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "base_sha256": made.model_sha256,
        "tokenizer_sha256": made.tokenizer_sha256,
        **hashes,
    }


def _train(model: nn.Module, run: Run, base: Base, text: texts.Training) -> list[float]:
    model.train()
    rng = random.Random(f"training {run.seed}")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=run.rate, weight_decay=0.0
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: bases.schedule(step, run))
    losses = []
    for _ in range(run.steps):
        loss = model(**_batch(text, run, base, rng)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break  # it does not come back
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def _batch(text: texts.Training, run: Run, base: Base, rng: random.Random) -> dict[str, Tensor]:
    windows = texts.draw(text.blocks, base.window, run.batch_size, rng)
    return {"input_ids": windows, "labels": windows}


@functools.lru_cache
def _loss_before(made: bases.Made, base: Base, windows: Tensor) -> float | None:
    """The loss of the base itself. Texts are read once in a process, so that this is kept too."""
    return _loss(bases.load(made, base), windows)


def _loss(model: nn.Module, windows: Tensor) -> float | None:
    return _finite(bases.mean_loss(model, windows))


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
