# SPDX-License-Identifier: Apache-2.0
"""A training run from options to files, on one process or under torchrun."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shira.cli import libraries
from shira.cli._train import model as models
from shira.cli._train.arguments import set_warmup, training_arguments
from shira.cli._train.checkpoints import (
    CHECKPOINTS,
    check_output,
    check_same,
    find_checkpoint,
    record_of,
    started,
    write_record,
)
from shira.cli._train.data import Collator, load_data
from shira.cli._train.evaluation import classification_figures, evaluate
from shira.cli._train.options import TrainOptions
from shira.cli._train.outputs import write_outputs
from shira.cli.output import console
from shira.cli.progress import say
from shira.errors import MissingDependencyError, ShiraError


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        before: figures of the evaluation before training; empty where they say nothing.
        after: figures of the evaluation after it; empty without data to evaluate on.
        history: what was logged, one mapping a line, each with its `step`.
        trained: parameters trained; `total` those of the base.
        seconds: of training, without loading and evaluating.
    """

    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]]
    train_loss: float
    steps: int
    trained: int
    total: int
    seconds: float
    processes: int
    device: str
    peak_bytes: int | None


def run_training(options: TrainOptions) -> None:
    """Train as the options say, and write everything to the output folder.

    Raises:
        ShiraError: For every mistake in the options or the data.
    """
    output = Path(options.output or "")
    checkpoint = find_checkpoint(output, options.resume)
    check_output(output, options, checkpoint)
    libraries.no_accelerator_note()
    _check_installed()
    from shira.cli.finite import FiniteTrainer, writing

    libraries.quieten(warnings_too=False)
    config = models.adapter_config(options)
    arguments = training_arguments(options, output)
    record = record_of(options, arguments.world_size)
    if checkpoint is not None:
        check_same(checkpoint, record)
    tokenizer = models.load_tokenizer(options)
    say(f"reading {options.train_file}")
    with arguments.main_process_first(desc="reading the data"):
        data = load_data(options, tokenizer)
    base = models.load_base(options, data.labels, tokenizer.pad_token_id)
    models.check_fits(base, options, data)
    total = sum(parameter.numel() for parameter in base.parameters())
    if checkpoint is None:
        model = models.adapt(base, config, options, data, tokenizer.pad_token_id, arguments.device)
    else:
        model = models.resume_adapter(base, checkpoint)
    _check_same_entries(model)

    set_warmup(arguments, options, rows=len(data.train))
    made = [folder for folder in (output / CHECKPOINTS, output) if not folder.exists()]
    progress, callbacks = _callbacks(record, started(checkpoint))
    trainer = FiniteTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=Collator(tokenizer.pad_token_id),
        compute_metrics=classification_figures if data.labels is not None else None,
        callbacks=callbacks,
    )
    _drop_printer(trainer)
    main = trainer.is_world_process_zero()
    before = {}
    if data.labels is None and data.evaluation is not None and checkpoint is None:
        before = evaluate(trainer)  # a new classification head has nothing to say yet
    began = time.perf_counter()
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # with a checkpoint in it, it stays
                folder.rmdir()
        raise
    finally:
        progress.close()
    seconds = time.perf_counter() - began
    after = evaluate(trainer) if data.evaluation is not None else {}
    if not math.isfinite(after.get("loss", 0.0)):
        raise ShiraError(
            f"the loss on the evaluation data is {after['loss']} after step "
            f"{trainer.state.global_step}. No adapter was written"
        )
    if not main:
        return
    result = Result(
        before=before,
        after=after,
        history=[_numbers(line) for line in trainer.state.log_history],
        train_loss=float(outcome.training_loss),
        steps=int(trainer.state.global_step),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=total,
        seconds=seconds,
        processes=arguments.world_size,
        device=_device_name(arguments.device),
        peak_bytes=_peak_bytes(arguments.device),
    )
    with writing("the adapter", output):
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output)
    write_outputs(output, options, data, result, model.peft_config["default"])
    _say_result(output, result)


def _check_installed() -> None:
    for package in ("transformers", "peft", "accelerate", "datasets", "matplotlib"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"training needs {error.name}, which is not installed: pip install 'shira[train]'"
            ) from error


def _check_same_entries(model: torch.nn.Module) -> None:
    """Under torchrun: every process must train the same entries, or gradients are mixed up."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    digest = hashlib.sha256()
    for name, buffer in model.state_dict().items():
        if "shira_indices" in name:
            digest.update(buffer.cpu().numpy().tobytes())
    found: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, digest.hexdigest())
    if len(set(found)) > 1:
        raise ShiraError(
            "the processes chose different entries, so they cannot train one adapter together; "
            "with --mask-type grad or snip, calibrate on one process and --resume from it"
        )


def _callbacks(record: Mapping[str, Any], since: float) -> tuple[Any, list[Any]]:
    from transformers import TrainerCallback

    from shira.cli.training_progress import ProgressCallback

    class Record(TrainerCallback):  # type: ignore[misc]
        """Writes the settings into each checkpoint."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_record(folder, record, since)

    progress = ProgressCallback("training")
    return progress, [progress, Record()]


def _numbers(line: Mapping[str, float]) -> dict[str, float]:
    """Return the logged values that are finite numbers, as JSON has no others."""
    return {name: value for name, value in line.items() if math.isfinite(value)}


def _drop_printer(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


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
