# SPDX-License-Identifier: Apache-2.0
"""Where a run's checkpoints lie, which one to go on from, and whether the folder is free."""

from __future__ import annotations

from pathlib import Path

from shira.cli._train.options import TrainOptions
from shira.errors import ConfigError

CHECKPOINTS = "checkpoints"


def find_checkpoint(output: Path, resume: str | None) -> Path | None:
    """The checkpoint that ``--resume`` means: ``last``, ``auto`` or a path.

    Raises:
        ConfigError: If there is none, save for ``auto``.
    """
    if resume is None:
        return None
    if resume not in ("last", "auto"):
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ConfigError(f"--resume {resume}: not a checkpoint (last and auto find one)")
        return Path(resume)
    found = [
        path
        for path in (output / CHECKPOINTS).glob("checkpoint-*")
        if (path / "trainer_state.json").is_file() and path.name.rpartition("-")[2].isdigit()
    ]
    if not found and resume == "last":
        raise ConfigError(
            f"--resume last: there is no checkpoint in {output / CHECKPOINTS}; without --resume "
            "the training starts anew, with --resume auto it does so if there is none"
        )
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(output: Path, options: TrainOptions, checkpoint: Path | None) -> None:
    """Refuse to write over an adapter unless told to.

    Raises:
        ConfigError: If there is one, and the run neither goes on from it nor may replace it.
    """
    taken = (output / "adapter_model.safetensors").exists()
    if taken and checkpoint is None and not options.overwrite:
        raise ConfigError(
            f"--output {output}: there is an adapter already; --overwrite replaces it, "
            "--resume last trains it on"
        )
