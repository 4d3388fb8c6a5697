# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer as the command line uses it: its arguments, checks, progress, figures."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    PrinterCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from shira.cli.options import one_of
from shira.cli.progress import Steps
from shira.cli.train.data import Data, collator
from shira.cli.train.options import DEFAULT_LEARNING_RATE, TrainOptions
from shira.cli.train.outputs import Result
from shira.errors import ConfigError, ShiraError

_SPEEDS = ("runtime", "_per_second", "_preparation_time")
_NAMED_ALIKE = (  # options of transformers' and ours
    *("weight_decay", "max_grad_norm", "gradient_accumulation_steps", "bf16"),
    *("seed", "logging_steps", "eval_steps", "save_total_limit"),
)
_SCHEDULERS = (  # of transformers', those that need no further argument
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
    *("constant_with_warmup", "inverse_sqrt"),
)
_OF_THE_EVALUATION = ("reduce_lr_on_plateau", "greedy")


@contextmanager
def writing(what: str, folder: object) -> Iterator[None]:
    """Tell in one line that something could not be written, whatever the library below raises."""
    try:
        yield
    except ShiraError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's, disk full
        raise ShiraError(
            f"{what} could not be written into {folder} (is the disk full?): {str(error)[:300]}. "
            "--resume last goes on from the last checkpoint that is whole"
        ) from error


class CheckedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that stops before it logs, saves or returns what is NaN or infinite.

    The first step with such a loss is noted on the device, so that no step waits for it.
    `after_saving` is called with the folder of each checkpoint that the process writes.
    """

    def __init__(
        self,
        *args: Any,
        what: str = "training",
        after_saving: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._after_saving = after_saving
        self._first: Any = math.inf  # a tensor as soon as there was a step
        self.progress = _Progress(what)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)

    def figures(self) -> dict[str, float]:
        """Evaluate, and return the figures without timings; every process must call it."""
        figures = {
            name.removeprefix("eval_"): float(value)
            for name, value in self.evaluate().items()
            if name.startswith("eval_") and not name.endswith(_SPEEDS)
        }
        if self.compute_metrics is None:  # of a language model
            figures["perplexity"] = math.exp(min(figures["loss"], 700.0))
        return figures

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step as the Trainer does, and note the first loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        step = loss.new_full((), self.state.global_step + 1, dtype=torch.float64)
        self._first = torch.where(loss.detach().isfinite(), math.inf, step).clamp(max=self._first)
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, which it also does at the end of the training."""
        self._check_finite()
        super().log(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_finite()
        step, folder = self.state.global_step, self.args.output_dir
        with writing(f"the checkpoint of step {step}", folder):
            super()._save_checkpoint(*args, **kwargs)
            if self._after_saving is not None and self.is_world_process_zero():
                self._after_saving(Path(folder or "") / f"checkpoint-{step}")

    def _check_finite(self) -> None:
        """Refuse to go on if the loss of a step until now, or a trained value, is not finite."""
        model: Any = self.model
        first, bad = float(self._first), "the loss"
        when = f"at step {first:.0f}"
        if not math.isfinite(first):
            trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
            bad = next((name for name, value in trained if not value.isfinite().all()), "")
            when = f"after step {self.state.global_step}"
        if bad:
            raise ShiraError(
                f"{bad} was not finite (NaN or infinite) {when}. No adapter was written. A smaller "
                "learning rate may help, or a base in float32 if it is in half precision"
            )


def make_trainer(
    model: Any, options: TrainOptions, data: Data, tokenizer: Any, arguments: Any, **more: Any
) -> CheckedTrainer:
    """Return what trains the model's trainable parameters on the data, and evaluates it."""
    set_warmup(arguments, options, rows=len(data.train))
    if options.optimizer == "factored":
        from shira import FactoredAdamW

        optimizer = FactoredAdamW(model, options.learning_rate, weight_decay=options.weight_decay)
        more.setdefault("optimizers", (optimizer, None))
    return CheckedTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=collator(options, tokenizer, model),
        compute_metrics=None if data.labels is None else classification_figures,
        **more,
    )


def fit(trainer: CheckedTrainer, *, total: int, checkpoint: Path | None = None) -> Result:
    """Train, evaluate before and after, and return the figures; `total` is the base's size."""
    evaluates = trainer.eval_dataset is not None
    before = {}
    model: Any = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with closing(trainer.progress):
        if evaluates and trainer.compute_metrics is None and checkpoint is None:
            before = trainer.figures()  # a new classification head has nothing to say yet
        began = time.perf_counter()
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - began
        after = trainer.figures() if evaluates else {}
    state, device = trainer.state, trainer.args.device
    if not math.isfinite(after.get("loss", 0.0)):
        raise ShiraError(
            f"the loss on the evaluation data is {after['loss']} after step {state.global_step}. "
            "No adapter was written"
        )
    on_cuda = device.type == "cuda"
    return Result(
        before=before,
        after=after,
        history=[  # JSON has finite numbers only
            {name: value for name, value in line.items() if math.isfinite(value)}
            for line in state.log_history
        ],
        train_loss=float(outcome.training_loss),
        steps=int(state.global_step),
        trained=trained,
        total=total,
        seconds=seconds,
        processes=trainer.args.world_size,
        device=torch.cuda.get_device_name(device) if on_cuda else device.type,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_cuda else None,
    )


def training_arguments(options: TrainOptions, folder: Path, **more: Any) -> Any:
    """Return transformers' ``TrainingArguments``, of which `more` wins over the options."""
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
        "learning_rate": options.learning_rate or DEFAULT_LEARNING_RATE,
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
    return TrainingArguments(**arguments | more)


def set_warmup(arguments: Any, options: TrainOptions, *, rows: int) -> None:
    """Set the warm-up in steps; a share of all steps leaves at least one at full rate."""
    a_step = options.batch_size * options.gradient_accumulation_steps * arguments.world_size
    steps = options.max_steps or math.ceil(rows / a_step * options.epochs)
    share = min(math.ceil(options.warmup * steps), steps - 1)
    arguments.warmup_steps = math.ceil(options.warmup) if options.warmup >= 1 else share


def _scheduler(name: str, evaluates: bool) -> str:
    known = list(SchedulerType)
    one_of("--scheduler", name, [n for n in (*_SCHEDULERS, *_OF_THE_EVALUATION) if n in known])
    if name in _OF_THE_EVALUATION and not evaluates:
        raise ConfigError(
            f"--scheduler {name} goes by the evaluation: give --eval-file or --eval-fraction"
        )
    return name


def classification_figures(prediction: Any) -> dict[str, float]:
    """Return accuracy, and the mean over the classes of F1 (a class that never occurs counts 0)."""
    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    said, true = logits.argmax(axis=-1), np.asarray(prediction.label_ids)
    hits, told, there = (
        np.bincount(labels, minlength=logits.shape[-1])
        for labels in (said[said == true], said, true)
    )
    scores = 2 * hits / np.maximum(told + there, 1)
    return {"accuracy": float((said == true).mean()), "macro_f1": float(scores.mean())}


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Shows the optimizer steps of a training and the last loss logged, and long evaluations."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._note = ""
        self._steps: Steps | None = None  # of the training, or of an evaluation outside of one
        self._evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if state.is_world_process_zero:
            self._steps = Steps(self._what, state.max_steps).__enter__()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        for key in logs.keys() & {"loss", "eval_loss"}:
            self._note = f"{key} {logs[key]:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.update(state.global_step, self._note)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._evaluated += 1
        total = len(kwargs["eval_dataloader"])
        if self._steps is None:
            self._steps = Steps("evaluating", total).__enter__()
        if self._steps.what == "evaluating":
            self._steps.update(self._evaluated)
        else:
            self._steps.update(state.global_step, f"evaluating {self._evaluated}/{total}")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated = 0

    def close(self) -> None:
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
        self._steps = None
