# SPDX-License-Identifier: Apache-2.0
"""One run: adapt, train and measure; the same loop for every method, on a CPU or a GPU.

AdamW without weight decay, warm-up over a tenth of the steps and then a line down to zero. Nothing
in the loop waits for the device.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from studies.lm import base as bases
from studies.lm import data as texts
from studies.lm.methods import ADAPTER, Adapted, adapt
from studies.lm.protocol import CALIBRATION_BATCHES, RENEWED_AT, RENEWED_SHARE, SETS, SOURCE, Run
from studies.lm.renew import EntryAdamW, candidates, renew

EVALUATED_AT_ONCE = {"cpu": 8, "cuda": 32}


def execute(run: Run, data: Path, base_folder: Path) -> dict[str, Any]:
    """Adapt the base in `base_folder`, and measure. A tuning run never reads a test file.

    Returns:
        ``target`` and ``source``: the loss (mean negative log-likelihood of a token, in nats; for
        questions of the right answer's; None where it is not finite) on validation rows or, for
        final runs, test rows; ``..._before`` of the base; for questions ``accuracy`` by set, and
        before; the trained parameters, the training loss of the last ten steps, seconds, hashes.
    """
    started = time.perf_counter()
    tokenizer = bases.tokenizer(base_folder)
    torch.backends.cuda.matmul.allow_tf32 = True  # where weights are float32
    # training everything in bfloat16 would lose small steps
    dtype = "float32" if run.method == "full" else run.dtype
    base = bases.load(base_folder, run.device, dtype)
    before = _measured_before(base, data, tokenizer, run.target, _measure_of(run))

    def drawn(purpose: str, count: int) -> list[dict[str, Tensor]]:
        made = texts.batches(run, data, tokenizer, purpose, count)
        return [{k: v.to(run.device) for k, v in batch.items()} for batch in made]

    torch.manual_seed(run.seed)
    adapted = adapt(copy.deepcopy(base), run, lambda: drawn("mask", CALIBRATION_BATCHES))
    training = time.perf_counter()
    losses = fit(adapted, run, drawn("training", run.steps))
    seconds = time.perf_counter() - training
    after = measure(adapted.model, data, tokenizer, run)
    trained = adapted.trained
    del adapted
    gc.collect()  # an adapted model refers to itself
    part = "test" if run.stage == "final" else "train"
    return {
        **after,
        **{f"{name}_before": value for name, value in before.items()},
        "trained": trained,
        "loss": _finite(sum(losses[-10:]) / len(losses[-10:])),
        "train_seconds": round(seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "base_sha256": bases.digest(base_folder),
        "files": {name: texts.hashes(data, name, part) for name in (run.target, SOURCE)},
    }


def fit(adapted: Adapted, run: Run, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    """Train on the batches, one a step; the loss of every step."""
    model = adapted.model.train()
    warmup = max(1, run.steps // 10)
    optimizer: torch.optim.Optimizer
    if adapted.renewed:
        optimizer = EntryAdamW(adapted.groups, warmup_steps=warmup)
    else:
        fused = run.device == "cuda"
        optimizer = torch.optim.AdamW(adapted.groups, weight_decay=0.0, fused=fused)
    renewals = {int(at * run.steps) for at in RENEWED_AT} if adapted.renewed else set()
    losses = []
    for step, batch in enumerate(batches):
        share = min(1, (step + 1) / warmup) * (1 - max(0, step - warmup) / (run.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = run.rate * group["factor"] * share
        now = step in renewals
        with candidates(model, ADAPTER, RENEWED_SHARE) if now else nullcontext({}) as grown:
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        optimizer.step()
        if isinstance(optimizer, EntryAdamW) and now:
            renew(model, ADAPTER, optimizer, grown)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


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
    size = EVALUATED_AT_ONCE[device]
    parts = []
    for at in range(0, len(order), size):
        batch = texts.padded(rows, order[at : at + size])
        ids, labels = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=texts.IGNORED, reduction="none"
        )
        parts.append(loss.sum(1) / (labels != texts.IGNORED).sum(1))
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
