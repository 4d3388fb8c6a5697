# SPDX-License-Identifier: Apache-2.0
"""Find a run's checkpoints, choose the one to resume from, and check that a folder is free.

Each has a record of its settings and of when its run was started, so that a run does not go on from
one of another job, nor from one of an earlier run into the same folder.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shira.cli.progress import say
from shira.cli.train.options import TrainOptions, flag
from shira.errors import ConfigError, ShiraError
from shira.store.atomic import check_kind, check_outputs, write_atomically

CHECKPOINTS = "checkpoints"
RECORD = "shira_train.json"

# A checkpoint of other values is not gone on from: they decide the entries, or the rows.
_FIXED = (
    *("task", "data", "eval_fraction", "text_column", "label_column", "max_length", "seed"),
    *("target_modules", "modules_to_save", "r", "density", "mask_type", "mask_seed", "mask_slot"),
    "optimizer",
)
_SHOWN = {"data": "training data (a hash)", "processes": "processes"}
# These change nothing that is trained. Of all others a difference is told.
_FREE = (
    *("train_file", "eval_file", "eval_batch_size", "logging_steps", "eval_steps", "save_steps"),
    *("save_total_limit", "cpu", "output", "resume", "overwrite"),
)


def find_checkpoint(output: Path, resume: str | None) -> Path | None:
    """Find the last whole checkpoint for ``--resume``, or check the one whose path it gives."""
    if resume is None:
        return None
    if resume not in ("last", "auto"):
        if why := _broken(Path(resume)):
            raise ConfigError(
                f"--resume {resume}: not a whole checkpoint: {why} (last and auto find one)"
            )
        return Path(resume)
    found = sorted(
        (started(path), int(path.name.rpartition("-")[2]), path)
        for path in (output / CHECKPOINTS).glob("checkpoint-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    )
    broken = ""
    for _, _, path in reversed(found):
        if (why := _broken(path)) is None:
            if broken:
                say(f"going on from {path.name}{broken}")
            return path
        broken += f". {path.name} is not whole ({why})"
    if broken or resume == "last":
        raise ConfigError(
            f"--resume {resume}: there is no whole checkpoint in {output / CHECKPOINTS}; without "
            f"--resume the training starts anew{broken}"
        )
    return None


WRITTEN = (  # by a run into its output folder
    *("adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.json"),
    *("train.yaml", "labels.json", "loss.png"),
)


def check_output(output: Path, options: TrainOptions, checkpoint: Path | None) -> None:
    """Refuse to write over the data, the base or, unless told to, an adapter."""
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


def record_of(options: TrainOptions, processes: int) -> dict[str, Any]:
    """Return the settings of a run as its checkpoints keep them, defaults filled in."""
    settings = asdict(options.filled())
    record = {name: value for name, value in settings.items() if name not in _FREE}
    digest = hashlib.blake2b(digest_size=16)
    with Path(options.train_file or "").open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {**record, "data": digest.hexdigest(), "processes": processes}


def write_record(checkpoint: Path, record: Mapping[str, Any], started: float) -> None:
    """Write the record of a checkpoint: from `record_of`, and from `started`."""
    text = json.dumps({**record, "started": started}, indent=1)
    write_atomically(checkpoint / RECORD, text.encode())


def started(checkpoint: Path | None) -> float:
    """Return when a run was started, in seconds since 1970: now, or as its checkpoint says."""
    if checkpoint is None:
        return time.time()
    try:
        return float(json.loads((checkpoint / RECORD).read_bytes())["started"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0.0  # of before there were records


def check_same(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose settings gave other entries or rows; tell any other difference."""
    path = checkpoint / RECORD
    if not path.is_file():
        say(f"{checkpoint.name} has no {RECORD}: its settings are not compared with those of now")
        return
    try:
        before = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise ConfigError(f"{path}: no record of settings; remove it to go on without")
    before = {"optimizer": "adamw", **before}  # the only one there was
    changed = {
        name: f"{_SHOWN.get(name) or flag(name)} {before.get(name)!r:.60}, now {value!r:.60}"
        for name, value in record.items()
        if before.get(name) != value
    }
    if fixed := [changed[name] for name in _FIXED if name in changed]:
        raise ConfigError(
            f"--resume: {checkpoint.name} was made with {'; '.join(fixed)}. Give what it was made "
            "with, or train anew into another folder"
        )
    for told in changed.values():
        say(f"{checkpoint.name} was made with {told}")


def _broken(path: Path) -> str | None:
    """Return why a checkpoint cannot be gone on from; None if it is whole."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from shira import Adapter

    for needed in ("trainer_state.json", "optimizer*", "scheduler.pt", "rng_state*"):
        if not any(path.glob(needed)) and not any(path.glob("global_step*")):  # DeepSpeed's
            return f"there is no {needed}"
    try:
        state = json.loads((path / "trainer_state.json").read_bytes())
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            return "trainer_state.json has no step"
        Adapter.load(path)
        for name, tensor in load_file(path / "adapter_model.safetensors").items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{name} is not finite"
        for packed in sorted(path.glob("*.pt*")):
            with zipfile.ZipFile(packed) as parts:
                if parts.testzip() is not None:
                    return f"{packed.name} is damaged"
    except (ShiraError, OSError, ValueError, RecursionError, SafetensorError) as error:
        return str(error).replace(f"{path}/", "")[:200]
    except zipfile.BadZipFile:
        return f"{packed.name} is damaged or cut short"
    return None
