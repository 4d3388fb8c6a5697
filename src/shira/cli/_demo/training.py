# SPDX-License-Identifier: Apache-2.0
"""Train a classifier for one task twice: on the frozen encoder, and with a SHiRA adapter in it.

Both runs start from the same head and see the same batches; what differs is the adapter alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from shira import ShiraConfig, get_peft_model
from shira.cli._demo.predict import accuracy, encode, pad, predict_logits
from shira.cli._demo.settings import Files, Settings, model_path
from shira.cli._demo.tasks import Example, Task
from shira.cli.train.trainer import CheckedTrainer


@dataclass(frozen=True)
class Run:
    """What one training gave."""

    accuracy: float
    trained: int
    trained_in_encoder: int
    total: int
    seconds: float
    file_bytes: int | None


def load_base(labels: int, seed: int) -> nn.Module:
    """The pretrained encoder with a new head of `labels` outputs that `seed` alone decides."""
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        model_path(), num_labels=labels
    )
    return model


def train_frozen(task: Task, tokenizer: Any, settings: Settings, *, outputs: int) -> Run:
    """Train the head alone; the encoder stays as it is."""
    model = load_base(outputs, settings.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    what = f"{task.name}: frozen encoder"
    run, _ = _train(model, task, tokenizer, settings, total=_size(model), what=what)
    return run


def train_shira(
    task: Task, tokenizer: Any, settings: Settings, *, outputs: int, slot: int, files: Files
) -> tuple[Run, Tensor]:
    """Train the same head and a SHiRA adapter in all linear layers of the encoder, and save both.

    Args:
        task: what to learn.
        tokenizer: the encoder's.
        settings: seed, density, rates and sizes.
        outputs: width of the head.
        slot: the adapter's mask slot; adapters in different slots share no entry.
        files: where the adapter is written.

    Returns:
        The figures, and the logits of the test set.
    """
    config = ShiraConfig(
        density=settings.density,
        mask_type="random",
        random_seed=settings.seed,
        mask_slot=slot,
        target_modules="all-linear",
        task_type="SEQ_CLS",  # trains and saves the head as well
    )
    base = load_base(outputs, settings.seed)
    total = _size(base)
    model = get_peft_model(base, config, adapter_name=task.name)
    log = files.adapter(task.name) / "trainer_state.json"
    run, logits = _train(
        model, task, tokenizer, settings, total=total, what=f"{task.name}: SHiRA", log=log
    )
    model.save_pretrained(str(files.root))
    (files.root / "README.md").unlink(missing_ok=True)  # PEFT's model card, an empty form
    size = (files.adapter(task.name) / "adapter_model.safetensors").stat().st_size
    return replace(run, file_bytes=size), logits


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _train(
    model: nn.Module,
    task: Task,
    tokenizer: Any,
    settings: Settings,
    *,
    total: int,
    what: str,
    log: Path | None = None,
) -> tuple[Run, Tensor]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CheckedTrainer(
            model=model,
            what=what,
            args=_arguments(scratch, settings),
            train_dataset=_dataset(tokenizer, task.train, settings.max_length),
            data_collator=_Collator(tokenizer.pad_token_id),
            optimizers=(_optimizer(model, settings), None),
        )
        trainer.train()
        if log is not None:
            log.parent.mkdir(exist_ok=True)
            trainer.state.save_to_json(str(log))
    seconds = time.perf_counter() - started
    ids = encode(tokenizer, [example.text for example in task.test], max_length=settings.max_length)
    logits = predict_logits(
        model, ids, pad_token_id=tokenizer.pad_token_id, what=f"{what}, predicting"
    )
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    in_head = sum(size for name, size in trained.items() if "classifier." in name)
    run = Run(
        accuracy=accuracy(logits, [example.label for example in task.test]),
        trained=sum(trained.values()),
        trained_in_encoder=sum(trained.values()) - in_head,
        total=total,
        seconds=seconds,
        file_bytes=None,
    )
    return run, logits


def _arguments(scratch: str | Path, settings: Settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=min(max(1, settings.steps // 16), settings.steps - 1),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, settings.steps // 20),
        save_strategy="no",
        report_to="none",
        use_cpu=True,  # small enough, and the proofs compare bits between two processes
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **_grouped_by_length(),
    )


def _grouped_by_length() -> dict[str, Any]:
    """Batches of texts of similar length, a fifth less to compute, as this transformers says it."""
    names = {field.name for field in fields(TrainingArguments)}
    if "train_sampling_strategy" in names:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if "classifier." in name],
            "lr": settings.head_learning_rate,
        },
        {
            "params": [p for name, p in named if "classifier." not in name],
            "lr": settings.learning_rate,
        },
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _dataset(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    ids = encode(tokenizer, [example.text for example in examples], max_length=max_length)
    return [
        {"input_ids": row, "labels": example.label}
        for row, example in zip(ids, examples, strict=True)
    ]


class _Collator:
    """Pads a batch to its longest text."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = pad([row["input_ids"] for row in rows], pad_token_id=self._pad_token_id)
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}
