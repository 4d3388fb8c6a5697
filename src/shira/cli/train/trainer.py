# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer as the command line uses it: checked, with our progress and our figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback

from shira.cli.progress import Steps
from shira.errors import ShiraError

_SPEEDS = ("runtime", "_per_second", "_preparation_time")


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

    Also where a checkpoint cannot be written, as on a full disk. The first step with such a loss is
    noted on the device, so that no step waits for it. Progress is shown by `shira.cli.progress`, as
    `what`; `after_saving` is called with the folder of each checkpoint that the process writes.
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
        self._first: torch.Tensor | None = None
        self._progress = _Progress(what)
        self.remove_callback(PrinterCallback)
        self.add_callback(self._progress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and leave the terminal as it was, also after an error."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._progress.close()

    def figures(self) -> dict[str, float]:
        """Evaluate, and return the figures without timings; every process must call it.

        Those of a language model, which has no other metrics, include its perplexity.
        """
        try:
            found = self.evaluate()
        finally:
            self._progress.close()
        figures = {
            name.removeprefix("eval_"): float(value)
            for name, value in found.items()
            if name.startswith("eval_") and not name.endswith(_SPEEDS)
        }
        if self.compute_metrics is None:
            figures["perplexity"] = math.exp(min(figures["loss"], 700.0))
        return figures

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step as the Trainer does, and note the first loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        step = loss.new_full((), self.state.global_step + 1, dtype=torch.float64)
        here = torch.where(torch.isfinite(loss.detach()), math.inf, step)
        self._first = here if self._first is None else torch.minimum(self._first, here)
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
        advice = (
            "No adapter was written. A smaller learning rate may help, or a base in float32 if it "
            "is in half precision"
        )
        first = math.inf if self._first is None else float(self._first)
        if math.isfinite(first):
            raise ShiraError(
                f"the loss was not finite (NaN or infinite) at step {first:.0f}. {advice}"
            )
        assert self.model is not None  # the Trainer's own type allows it before it has one
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise ShiraError(
                    f"{name} was not finite (NaN or infinite) after step {self.state.global_step}. "
                    f"{advice}"
                )


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
        self._training: Steps | None = None
        self._evaluation: Steps | None = None  # where it is not within a training
        self._evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._training = Steps(self._what, state.max_steps).__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key in ("loss", "eval_loss"):
            if key in (logs or {}):
                self._note = f"{key} {logs[key]:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training is not None:
            self._training.update(state.global_step, self._note)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._evaluated += 1
        total = len(eval_dataloader)
        if self._training is not None:
            self._training.update(state.global_step, f"evaluating {self._evaluated}/{total}")
            return
        if self._evaluation is None:
            self._evaluation = Steps("evaluating", total).__enter__()
        self._evaluation.update(self._evaluated)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = 0

    def close(self) -> None:
        """Leave the terminal as it was, also where the training or an evaluation broke off."""
        self._evaluated = 0
        for steps in (self._training, self._evaluation):
            if steps is not None:
                steps.__exit__(None, None, None)
        self._training = self._evaluation = None
