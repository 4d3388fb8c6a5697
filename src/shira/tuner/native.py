# SPDX-License-Identifier: Apache-2.0
"""Adapters that transformers itself puts into a model: ``model.add_adapter(ShiraConfig(...))``.

The model is no `PeftModel` then, and transformers' Trainer saves the adapter in its checkpoints but
looks for the whole model when it resumes or loads the best one. It is told here where to look.
"""

from __future__ import annotations

import os
from typing import Any

import peft
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from shira.errors import AdapterError, FileFormatError
from shira.store.names import VALUES, base_module_name
from shira.tuner.loading import check_file
from shira.tuner.saving import layers_of


def is_native(model: Any) -> bool:
    """Return whether transformers itself has put SHiRA adapters into a model."""
    inside = getattr(model, "_hf_peft_config_loaded", False) is True
    return inside and not isinstance(model, peft.PeftModel) and bool(layers_of(model))


def resume(load: Any, trainer: Any, checkpoint: str, model: Any = None) -> None:
    """Load a checkpoint's adapter, in the place of ``Trainer._load_from_checkpoint``."""
    if is_native(trainer.model):
        load_checkpoint(trainer, checkpoint)
    else:
        load(trainer, checkpoint, model)


def load_best(load: Any, trainer: Any) -> None:
    """Load the best checkpoint's adapter, in the place of ``Trainer._load_best_model``."""
    if is_native(trainer.model):
        load_checkpoint(trainer, trainer.state.best_model_checkpoint)
    else:
        load(trainer)


def load_checkpoint(trainer: Any, folder: str) -> None:
    """Load the adapter in a Trainer's checkpoint into the one that its model has.

    Raises:
        AdapterError: If several adapters are active, or the model is sharded or DeepSpeed's.
        FileFormatError: If the checkpoint has no adapter, or one that does not fit.
        WrongBaseError: If it was made on another base.
    """
    model: nn.Module = trainer.model
    names = [name for name in model.active_adapters() if name]  # type: ignore[operator]
    several = f"{len(names)} adapters are active" if len(names) != 1 else ""
    sharded = "FSDP or DeepSpeed" if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else ""
    if why := several or sharded:
        raise AdapterError(
            f"{folder}: a checkpoint is loaded into a model whose adapters are transformers' own "
            f"(model.add_adapter) only if one is active and one process has it all, but here is "
            f"{why}; make the model with shira.get_peft_model(model, config), whose checkpoints "
            "Trainer loads in each of these cases"
        )
    if not os.path.exists(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        raise FileFormatError(
            f"{folder}: no checkpoint of an adapter: no {SAFETENSORS_WEIGHTS_NAME}"
        )
    check_file(model, folder, {})
    state = peft.load_peft_weights(folder, device="cpu")
    there = {base_module_name(key.removesuffix(f".{VALUES}")) for key in state}
    for path in layers_of(model, names[0]):
        if base_module_name(path) not in there:
            raise FileFormatError(
                f"{folder}: the checkpoint's adapter has no {path!r}, which the model's adapter "
                f"{names[0]!r} has; resume with the configuration that the run began with"
            )
    peft.set_peft_model_state_dict(model, state, adapter_name=names[0])
