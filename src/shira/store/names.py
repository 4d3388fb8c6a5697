# SPDX-License-Identifier: Apache-2.0
"""From the paths of a wrapped, adapted model to the base model's own parameter names.

PEFT puts ``base_model.model.`` in front and ``.base_layer`` behind, compilation, FSDP and
checkpointing put names of their own in between, data parallelism puts ``module.`` in front. An
adapter knows parameters by the names that the base has without any of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the base model's own module names, in a `PeftModel` and in its files."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"})


def base_module_name(path: str) -> str:
    """A module's path in a model or in a PEFT file, as the base model would call it.

    Args:
        path: Such as ``base_model.model.model.layers.0.mlp.up_proj.base_layer``.

    Returns:
        Such as ``model.layers.0.mlp.up_proj``.
    """
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    bare = ".".join(parts)
    if bare + "." == PEFT_PREFIX:
        return ""
    return ".".join(p for p in bare.removeprefix(PEFT_PREFIX).split(".") if p != "base_layer")


def weight_name(module: str) -> str:
    """The parameter name of a module's weight."""
    return f"{module}.weight" if module else "weight"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that stand around a whole model (compile, DDP, DeepSpeed)."""
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif type(model).__name__ in _PARALLEL:
            inner = model._modules["module"]
        elif hasattr(model, "inject_adapter") and "model" in model._modules:
            inner = model._modules["model"]  # a PEFT tuner without the PeftModel around it
        else:
            return model
        if inner is None:
            return model
        model = inner


def full_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape a weight has when it is neither packed (4-bit) nor partitioned (ZeRO-3)."""
    packed = getattr(getattr(weight, "quant_state", None), "shape", None)
    partitioned = getattr(weight, "ds_shape", None)
    shape: Sequence[int] = packed or partitioned or weight.shape
    return tuple(int(size) for size in shape)
