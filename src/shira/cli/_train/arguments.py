# SPDX-License-Identifier: Apache-2.0
"""The options of a run as transformers' ``TrainingArguments``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from shira.cli._train.checkpoints import CHECKPOINTS
from shira.cli._train.options import TrainOptions
from shira.errors import ConfigError, did_you_mean


def training_arguments(options: TrainOptions, output: Path) -> Any:
    """The arguments of the Trainer; the warm-up is left to `set_warmup`.

    Raises:
        ConfigError: If there is no such scheduler, or it needs more than there is.
    """
    from transformers import TrainingArguments

    evaluates = options.eval_file is not None or options.eval_fraction is not None
    on_cpu = options.cpu or not torch.accelerator.is_available()
    extra: dict[str, Any] = {}
    if options.gradient_checkpointing:
        extra["gradient_checkpointing"] = True
        extra["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        extra["ddp_backend"] = "gloo"
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_scheduler(options.scheduler, evaluates),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size or options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        bf16=options.bf16,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=options.logging_steps,
        eval_strategy=("steps" if options.eval_steps else "epoch") if evaluates else "no",
        eval_steps=options.eval_steps,
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=options.save_total_limit,
        prediction_loss_only=options.task == "causal-lm",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_broadcast_buffers=False,  # the entries are the same everywhere and never change
        ddp_find_unused_parameters=False,
        **extra,
    )


def set_warmup(arguments: Any, options: TrainOptions, *, rows: int) -> None:
    """Set the warm-up in steps, as releases of transformers differ in how they take a share.

    Args:
        arguments: changed in place.
        options: say the warm-up in steps, or as a share of all steps.
        rows: rows of the training data.
    """
    a_step = options.batch_size * options.gradient_accumulation_steps * arguments.world_size
    steps = options.max_steps or math.ceil(rows / a_step * options.epochs)
    share = min(math.ceil(options.warmup * steps), steps - 1)  # a step at full rate is left
    arguments.warmup_steps = math.ceil(options.warmup) if options.warmup >= 1 else share


_SCHEDULERS = (  # of transformers', those that need no further argument
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
    *("constant_with_warmup", "inverse_sqrt"),
)
_OF_THE_EVALUATION = ("reduce_lr_on_plateau", "greedy")


def _scheduler(name: str, evaluates: bool) -> str:
    from transformers import SchedulerType

    kinds = {str(kind.value) for kind in SchedulerType}
    known = [each for each in (*_SCHEDULERS, *_OF_THE_EVALUATION) if each in kinds]
    if name not in known:
        raise ConfigError(
            f"--scheduler is one of {', '.join(known)}, not {name!r}.{did_you_mean(name, known)}"
        )
    if name in _OF_THE_EVALUATION and not evaluates:
        raise ConfigError(
            f"--scheduler {name} goes by the evaluation: give --eval-file or --eval-fraction"
        )
    return name
