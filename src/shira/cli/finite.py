# SPDX-License-Identifier: Apache-2.0
"""A Trainer that ends with an error where the loss or a trained value is not finite.

Or where a checkpoint cannot be written, as on a full disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from shira.errors import ShiraError


@contextmanager
def writing(what: str, folder: object) -> Iterator[None]:
    """Tell in one line that something could not be written, whatever the library below raises.

    Raises:
        ShiraError: For errors of the system, of torch and of safetensors.
    """
    try:
        yield
    except ShiraError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's, disk full
        raise ShiraError(
            f"{what} could not be written into {folder} (is the disk full?): {str(error)[:300]}. "
            "--resume last goes on from the last checkpoint that is whole"
        ) from error


class FiniteTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that stops before it logs, saves or returns what is NaN or infinite.

    The first step with such a loss is noted on the device, so that no step waits for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first: torch.Tensor | None = None
        self.add_callback(_Check(self))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step as the Trainer does, and note the first loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        step = loss.new_full((), self.state.global_step + 1, dtype=torch.float64)
        here = torch.where(torch.isfinite(loss.detach()), math.inf, step)
        self._first = here if self._first is None else torch.minimum(self._first, here)
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(f"the checkpoint of step {self.state.global_step}", self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def check_finite(self) -> None:
        """Check the losses of all steps until now, and the trained values.

        Raises:
            ShiraError: If one is not finite; the message has the step.
        """
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


class _Check(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: FiniteTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._trainer.check_finite()

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_finite()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_finite()
