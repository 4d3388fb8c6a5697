# SPDX-License-Identifier: Apache-2.0
"""A training run from options to files, on one process or under torchrun."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from shira.cli.options import one_of
from shira.cli.output import console, needed_for, no_accelerator_note, quieten
from shira.cli.progress import say
from shira.cli.train import checkpoints
from shira.cli.train import model as models
from shira.cli.train.data import collator, load_data
from shira.cli.train.options import TrainOptions
from shira.cli.train.outputs import Result, write_outputs
from shira.errors import ConfigError, ShiraError


def run_training(options: TrainOptions) -> None:
    """Train as the options say, and write everything to the output folder.

    Raises:
        ShiraError: For every mistake in the options or the data.
    """
    output = Path(options.output or "")
    checkpoint = checkpoints.find_checkpoint(output, options.resume)
    checkpoints.check_output(output, options, checkpoint)
    no_accelerator_note()
    for package in ("transformers", "peft", "accelerate", "datasets", "matplotlib"):
        with needed_for("training", "'shira[train]'"):
            __import__(package)
    from shira import PeftModel
    from shira.cli.train.trainer import CheckedTrainer, classification_figures, writing

    quieten(warnings_too=False)
    config = models.adapter_config(options)
    arguments = training_arguments(options, output / checkpoints.CHECKPOINTS)
    record = checkpoints.record_of(options, arguments.world_size)
    if checkpoint is not None:
        checkpoints.check_same(checkpoint, record)
    tokenizer = models.load_tokenizer(options)
    say(f"reading {options.train_file}")
    with arguments.main_process_first(desc="reading the data"):
        data = load_data(options, tokenizer)
    base = models.load_base(options, data.labels, tokenizer.pad_token_id)
    models.check_modules(base, options)
    models.check_fits(base, options, data)
    total = sum(parameter.numel() for parameter in base.parameters())
    if checkpoint is None:
        model = models.adapt(base, config, options, data, tokenizer, arguments.device)
    else:
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)

    set_warmup(arguments, options, rows=len(data.train))
    since = checkpoints.started(checkpoint)
    made = [folder for folder in (output / checkpoints.CHECKPOINTS, output) if not folder.exists()]
    trainer = CheckedTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=collator(options, tokenizer),
        compute_metrics=classification_figures if data.labels is not None else None,
        after_saving=lambda folder: checkpoints.write_record(folder, record, since),
    )
    before = {}
    if data.labels is None and data.evaluation is not None and checkpoint is None:
        before = trainer.figures()  # a new classification head has nothing to say yet
    began = time.perf_counter()
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # with a checkpoint in it, it stays
                folder.rmdir()
        raise
    seconds = time.perf_counter() - began
    after = trainer.figures() if data.evaluation is not None else {}
    if not math.isfinite(after.get("loss", 0.0)):
        raise ShiraError(
            f"the loss on the evaluation data is {after['loss']} after step "
            f"{trainer.state.global_step}. No adapter was written"
        )
    if not trainer.is_world_process_zero():
        return
    device = arguments.device
    on_cuda = device.type == "cuda"
    result = Result(
        before=before,
        after=after,
        history=[  # JSON has finite numbers only
            {name: value for name, value in line.items() if math.isfinite(value)}
            for line in trainer.state.log_history
        ],
        train_loss=float(outcome.training_loss),
        steps=int(trainer.state.global_step),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=total,
        seconds=seconds,
        processes=arguments.world_size,
        device=torch.cuda.get_device_name(device) if on_cuda else device.type,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
    )
    with writing("the adapter", output):
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output)
    write_outputs(output, options, data, result, model.peft_config["default"])
    _say_result(output, result)


def training_arguments(options: TrainOptions, folder: Path, **more: Any) -> Any:
    """Return transformers' ``TrainingArguments``; the warm-up is left to `set_warmup`.

    Checkpoints go to `folder`; `more` wins over what follows from the options.
    """
    from transformers import TrainingArguments

    evaluates = options.eval_file is not None or options.eval_fraction is not None
    on_cpu = options.cpu or not torch.accelerator.is_available()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "lr_scheduler_type": _scheduler(options.scheduler, evaluates),
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.eval_batch_size or options.batch_size,
        "data_seed": options.seed,
        "eval_strategy": ("steps" if options.eval_steps else "epoch") if evaluates else "no",
        "save_strategy": "steps" if options.save_steps else "epoch",
        "save_steps": options.save_steps or 500,
        "prediction_loss_only": options.task == "causal-lm",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "ddp_broadcast_buffers": False,  # the entries are the same everywhere and never change
        "ddp_find_unused_parameters": False,
        **{name: getattr(options, name) for name in _NAMED_ALIKE},
    }
    if options.gradient_checkpointing:  # else not said: later releases deprecate the name
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        arguments["ddp_backend"] = "gloo"
    return TrainingArguments(**{**arguments, **more})


_NAMED_ALIKE = (
    *("learning_rate", "weight_decay", "max_grad_norm", "gradient_accumulation_steps", "bf16"),
    *("seed", "logging_steps", "eval_steps", "save_total_limit"),
)


def set_warmup(arguments: Any, options: TrainOptions, *, rows: int) -> None:
    """Set the warm-up in steps; a share of all steps leaves at least one at full rate."""
    a_step = options.batch_size * options.gradient_accumulation_steps * arguments.world_size
    steps = options.max_steps or math.ceil(rows / a_step * options.epochs)
    share = min(math.ceil(options.warmup * steps), steps - 1)
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
    one_of("--scheduler", name, known)
    if name in _OF_THE_EVALUATION and not evaluates:
        raise ConfigError(
            f"--scheduler {name} goes by the evaluation: give --eval-file or --eval-fraction"
        )
    return name


def _say_result(output: Path, result: Result) -> None:
    out = console()
    for when, figures in (("before", result.before), ("after", result.after)):
        if figures:
            shown = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if k != "epoch")
            out.print(f"{when}: {shown}")
    out.print(
        f"{result.steps} steps, {result.seconds:.0f} s, {result.trained:,} of {result.total:,} "
        f"parameters trained ({result.trained / result.total:.2%})"
    )
    say(f"adapter, model card and figures are in {output}")
