# SPDX-License-Identifier: Apache-2.0
"""Where a run's checkpoints lie, which one to go on from, and whether the folder is free."""

from __future__ import annotations

from pathlib import Path

from shira.cli._train.options import TrainOptions
from shira.errors import ConfigError
from shira.store.atomic import check_kind
from shira.store.outputs import check_outputs

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


WRITTEN = (
    *("adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.json"),
    *("train.yaml", "labels.json", "loss.png"),
)
"""The files that a run writes into its output folder."""


def check_output(output: Path, options: TrainOptions, checkpoint: Path | None) -> None:
    """Refuse to write over the data, the base or, unless told to, an adapter.

    (The ``train.yaml`` of the folder may be the file of ``--config``: it is the record of the run.)

    Raises:
        ConfigError: If one of them would be overwritten, or an adapter is there and the run neither
            goes on from it nor may replace it.
    """
    check_kind(output, folder=True)
    check_outputs(
        {f"--output, {name}:": output / name for name in WRITTEN},
        [options.train_file, options.eval_file],
        [options.model],
    )
    taken = (output / "adapter_model.safetensors").exists()
    if taken and checkpoint is None and not options.overwrite:
        raise ConfigError(
            f"--output {output}: there is an adapter already; --overwrite replaces it, "
            "--resume last trains it on"
        )
