# SPDX-License-Identifier: Apache-2.0
"""From a live, wrapped, adapted model to the base's own parameter names and whole tensors.

PEFT puts ``base_model.model.`` in front and ``.base_layer`` behind, compilation, FSDP and
checkpointing put names of their own in between, data parallelism puts ``module.`` in front. An
adapter knows parameters by the names that the base has without any of these.

FSDP2 (``DTensor``) and DeepSpeed ZeRO-3 leave each process a part of a tensor. To make one whole is
a collective call: every process has to make it. DeepSpeed is imported only if a parameter is its.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from shira.errors import AdapterError

PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of the base model's own module names, in a `PeftModel` and in its files."""

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
"""The files of an adapter in PEFT's format."""

VALUES = "shira_weight"
INDICES = "shira_indices"
"""Names of a layer's values and positions, and of the tensors with them in a file."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"})
_OUTER = "module."
"""The prefix of data parallelism; a model may also have a part of this name."""


def bare_name(path: str) -> str:
    """Return the path of a module or tensor without the names that wrappers and PEFT add to it.

    ``module.`` is a wrapper's only where PEFT's prefix follows it: `own_names` knows the model, and
    tells in other cases too.

    Example:
        >>> bare_name("module.base_model.model.layers.0._orig_mod.up.base_layer.weight")
        'layers.0.up.base_layer.weight'
    """
    inner = bare = without_wrappers(path)
    while inner.startswith(_OUTER):
        inner = inner.removeprefix(_OUTER)
    if f"{inner}.".startswith(PEFT_PREFIX):
        bare = f"{inner}.".removeprefix(PEFT_PREFIX).removesuffix(".")
    return bare


def without_wrappers(path: str) -> str:
    """Return a path without what compilation, FSDP and checkpointing have put into it."""
    if not (path.startswith("_") or "._" in path):  # as all these names do
        return path
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def base_module_name(path: str) -> str:
    """Return a module's path in a model or in a PEFT file as the base model would call it.

    Example:
        >>> base_module_name("base_model.model.model.layers.0.mlp.up_proj.base_layer")
        'model.layers.0.mlp.up_proj'
    """
    bare = bare_name(path)
    if "base_layer" not in bare:
        return bare
    return ".".join(part for part in bare.split(".") if part != "base_layer")


def own_names(keys: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Return ``{key: name}``: what a model itself calls the tensors of some of its modules.

    Keys may have the prefixes of another wrapping; those of no tensor in the modules are left out.

    Raises:
        AdapterError: If two keys are names of one tensor.
    """
    known = {bare_name(module): module for module in modules}
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        bare = bare_name(key)
        while (module := _inside(bare, known)) is None and bare.startswith(_OUTER):
            bare = bare.removeprefix(_OUTER)
        if module is None:
            continue
        name = found[key] = known[module] + bare[len(module) :]
        if taken.setdefault(name, key) != key:
            raise AdapterError(f"{taken[name]!r} and {key!r} are both names of {name!r}")
    return found


def _inside(path: str, modules: Container[str]) -> str | None:
    """Return the innermost of some modules that a path is inside of."""
    while "." in path:
        path = path.rpartition(".")[0]
        if path in modules:
            return path
    return None


def weight_name(module: str) -> str:
    """Return the parameter name of a module's weight."""
    return f"{module}.weight" if module else "weight"


def name_of_layer(path: str, layer: object) -> str:
    """Return what the base calls the parameter that an adapted layer at a path is for.

    Its ``weight``; of a layer for another parameter of a module that one (``parameter_name``).
    """
    module, parameter = base_module_name(path), getattr(layer, "parameter_name", "weight")
    return f"{module}.{parameter}" if module else str(parameter)


def is_parameter(name: str, target_parameters: Collection[str] | None) -> bool:
    """Return whether ``target_parameters`` names a parameter, wholly or by its end, as PEFT does.

    Example:
        >>> is_parameter("model.layers.0.mlp.experts.down_proj", ["experts.down_proj"])
        True
    """
    targets = target_parameters or ()
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def stack_of(
    name: str, shape: Sequence[int], target_parameters: Collection[str] | None
) -> tuple[int, tuple[int, ...]]:
    """Return how many matrices a weight holds, and the shape of one.

    A parameter of three dimensions that ``target_parameters`` names is a stack of them, as the
    experts of a mixture ``[experts, out, in]``: budget and mask are each one's own. All else is
    one.

    Example:
        >>> stack_of("mlp.experts.down_proj", (8, 16, 32), ["down_proj"])
        (8, (16, 32))
    """
    if len(shape) == 3 and is_parameter(name, target_parameters):
        return int(shape[0]), (int(shape[1]), int(shape[2]))
    return 1, tuple(shape)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what wraps a whole model (compile, DDP, DeepSpeed)."""
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
    """Return the shape a weight has when it is neither packed (4-bit) nor partitioned (ZeRO-3)."""
    packed = getattr(getattr(weight, "quant_state", None), "shape", None)
    partitioned = getattr(weight, "ds_shape", None)
    shape: Sequence[int] = packed or partitioned or weight.shape
    return tuple(int(size) for size in shape)


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether ZeRO-3 keeps this parameter, be it gathered just now or not."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds a part of the tensor only."""
    if is_partitioned(tensor):
        return str(tensor.ds_status.name) != "AVAILABLE"  # type: ignore[attr-defined]
    return hasattr(tensor, "full_tensor")


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Make ZeRO-3's parameters whole, to be read, while the context lasts."""
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor) and is_sharded(tensor)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, detached; inside `gathered` if ZeRO-3 keeps it."""
    tensor = tensor.detach()
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
