# SPDX-License-Identifier: Apache-2.0
"""Train a classifier for one task twice: on the frozen encoder, and with a SHiRA adapter in it.

Both runs go through the code of ``shira train``, start from the same head and see the same batches;
what differs is the adapter alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from shira.cli.demo.settings import Settings
from shira.cli.demo.tasks import Task
from shira.cli.progress import track
from shira.cli.train.data import Data, collator
from shira.cli.train.model import adapt, adapter_config, load_base
from shira.cli.train.trainer import CheckedTrainer, set_warmup, training_arguments
from shira.store.names import WEIGHTS_NAME

_BATCH = 64  # texts to predict at once


@dataclass(frozen=True)
class Run:
    """Figures of one training."""

    accuracy: float
    trained: int
    trained_in_encoder: int
    total: int
    seconds: float
    file_bytes: int | None


def head_labels(outputs: int) -> tuple[str, ...]:
    """Return labels for a head of this width: two tasks share one, so that one base fits both."""
    return tuple(map(str, range(outputs)))


def train_task(
    task: Task, tokenizer: Any, settings: Settings, *, outputs: int, slot: int, root: Path
) -> tuple[dict[str, Run], Tensor]:
    """Train a head of `outputs` alone, then the same with an adapter in all linear layers.

    Adapters in different mask slots share no entry. Head and adapter are written into the folder of
    `root` that is named as the task. Returns the figures of ``"frozen"`` and ``"shira"``, and the
    test set's last logits.
    """
    options = settings.options(slot)
    texts = [doc.text for doc in task.train]
    ids = tokenizer(texts, truncation=True, max_length=options.max_length)["input_ids"]
    answers = map(task.answer, task.train)
    rows = [{"input_ids": row, "labels": y} for row, y in zip(ids, answers, strict=True)]
    data = Data(rows, None, head_labels(outputs))
    device = torch.device("cpu")
    folder = root / task.name
    runs = {}
    for adapted in (False, True):
        what = f"{task.name}: {'SHiRA' if adapted else 'frozen encoder'}"
        model = load_base(options, data.labels, tokenizer.pad_token_id)
        total = sum(parameter.numel() for parameter in model.parameters())
        if adapted:
            model = adapt(model, adapter_config(options), options, data, tokenizer, device)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(_in_head(name))
        started = time.perf_counter()
        trainer = _train(model, data, tokenizer, settings, what)
        seconds = time.perf_counter() - started
        if adapted:
            model.save_pretrained(folder)
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, an empty form
        texts = [doc.text for doc in task.test]
        logits = predict_logits(model, tokenizer, texts, settings, f"{what}, predicting")
        right = logits.argmax(dim=1) == torch.tensor([task.answer(doc) for doc in task.test])
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        runs["shira" if adapted else "frozen"] = Run(
            accuracy=float(right.float().mean()),
            trained=sum(trained.values()),
            trained_in_encoder=sum(n for name, n in trained.items() if not _in_head(name)),
            total=total,
            seconds=seconds,
            file_bytes=(folder / WEIGHTS_NAME).stat().st_size if adapted else None,
        )
    return runs, logits


def _train(
    model: nn.Module, data: Data, tokenizer: Any, settings: Settings, what: str
) -> CheckedTrainer:
    options = settings.options()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if _in_head(name)]
    deltas = [p for name, p in named if not _in_head(name)]
    groups = [
        {"params": head, "lr": settings.head_learning_rate},
        {"params": deltas, "lr": settings.learning_rate},
    ]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(
            options, Path(scratch), save_strategy="no", **_grouped_by_length()
        )
        set_warmup(arguments, options, rows=len(data.train))
        trainer = CheckedTrainer(
            model=model,
            what=what,
            args=arguments,
            train_dataset=data.train,
            data_collator=collator(options, tokenizer),
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        )
        trainer.train()
    return trainer


def _in_head(name: str) -> bool:
    return "classifier." in name


def _grouped_by_length() -> dict[str, Any]:
    """Return the argument for batches of similar length, a fifth less to compute, as it is named.

    Transformers has changed it.
    """
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


@torch.no_grad()
def predict_logits(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], settings: Settings, what: str
) -> Tensor:
    """Return the logits of each text, float32 ``(texts, labels)``, in evaluation mode."""
    model.eval()
    made = []
    for start in track(range(0, len(texts), _BATCH), what):
        batch = tokenizer(
            texts[start : start + _BATCH],
            padding=True,
            truncation=True,
            max_length=settings.max_length,
            return_tensors="pt",
        )
        made.append(model(**batch).logits.float())
    return torch.cat(made)
