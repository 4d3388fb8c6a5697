# SPDX-License-Identifier: Apache-2.0
"""A transformers Trainer callback that shows training with `shira.cli.progress`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from shira.cli.progress import Steps


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows the optimizer steps of a training and the last loss logged, and long evaluations.

    Args:
        what: What is being trained, e.g. ``"training"``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._note = ""
        self._steps: Steps | None = None
        self._evaluation: Steps | None = None
        self._evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to show, on one process of several."""
        if state.is_world_process_zero:
            self._steps = Steps(self._what, state.max_steps).__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss to stand beside the count."""
        for key in ("loss", "eval_loss"):
            if key in (logs or {}):
                self._note = f"{key} {logs[key]:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step more."""
        if self._steps is not None:
            self._steps.update(state.global_step, self._note)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """One batch of an evaluation more: beside the training's bar, or as a bar of its own."""
        if not state.is_world_process_zero:
            return
        self._evaluated += 1
        total = len(eval_dataloader)
        if self._steps is not None:
            self._steps.update(state.global_step, f"evaluating {self._evaluated}/{total}")
            return
        if self._evaluation is None:
            self._evaluation = Steps("evaluating", total).__enter__()
        self._evaluation.update(self._evaluated)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The evaluation is over."""
        self._evaluated = 0
        if self._evaluation is not None:
            self._evaluation.__exit__(None, None, None)
            self._evaluation = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop to show."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also where the training or an evaluation broke off."""
        self.on_evaluate(None, None, None)
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None
