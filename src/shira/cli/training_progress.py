# SPDX-License-Identifier: Apache-2.0
"""A transformers Trainer callback that shows training with `shira.cli.progress`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from shira.cli.progress import Steps


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Shows the optimizer steps of a training, and the last loss that was logged.

    Args:
        what: What is being trained, e.g. ``"training"``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._note = ""
        self._steps: Steps | None = None

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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop to show."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also where the training broke off."""
        if self._steps is not None:
            self._steps.__exit__(None, None, None)
            self._steps = None
