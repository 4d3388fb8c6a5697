# SPDX-License-Identifier: Apache-2.0
"""Calling the layer under an adapted one, with its hooks, and reading what it holds on the way.

An adapted layer multiplies with the base layer's weight itself, or has the base layer's forward do
so with another weight. Users, Accelerate's offloading and FSDP hang hooks on the base layer and
expect them to fire, with the base layer as the module.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from shira.errors import TargetError
from shira.ops.memory import keep_over_fork
from shira.store.names import is_partitioned, is_sharded

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_MACHINERY = ("torch.distributed.", "deepspeed.")

_swapping = threading.RLock()
keep_over_fork(_swapping)


def members(module: nn.Module, *names: str) -> list[Any]:
    """Return ``[getattr(module, name), ...]``: fast attribute lookup for hot paths.

    ``module.weight`` is first looked for, in vain, as an ordinary attribute and then found by
    ``nn.Module.__getattr__``: a microsecond a name, which a layer's call paid twenty times over.
    """
    parameters, modules = module._parameters, module._modules
    found: list[Any] = []
    for name in names:
        if name in parameters:
            found.append(parameters[name])
        elif name in modules:
            found.append(modules[name])
        else:  # FSDP1 and parametrizations put something else in a parameter's place
            found.append(getattr(module, name))
    return found


def device_of_work(module: nn.Module) -> torch.device | None:
    """Return the device to which an offloaded module is brought; None if it is not offloaded."""
    if not has_offloaded_params(module):
        return None
    hook: Any = module._hf_hook
    device: Any = hook.execution_device
    return torch.device("cpu" if device is None else device)


def onloaded(values: nn.ParameterDict, name: str, what: str) -> Tensor:
    """Return an adapter's values, brought from where Accelerate has put them.

    Args:
        values: All adapters' values of a layer.
        name: Of the adapter.
        what: The weight's name, for the error.

    Raises:
        TargetError: If they are offloaded and to be trained: the gradient would be lost.
    """
    here: Tensor = values[name]
    if not here.is_meta or not has_offloaded_params(values):
        return here
    if here.requires_grad and torch.is_grad_enabled():
        raise TargetError(
            f"{what}: the values of adapter {name!r} are offloaded, so they cannot be trained; "
            "offload the base model first, and add the adapter afterwards"
        )
    with align_module_device(values):
        brought: Tensor = values[name].detach()
    return brought


def gather_for_call(layer: nn.Module, parameter: Tensor) -> None:
    """Gather a parameter of ZeRO-3 for the call of a layer that is under way, and for later ones.

    DeepSpeed gathers the parameters of a module that is called, and does this itself where it sees
    a module use another's parameter. The values of an adapter are in a dictionary, which is never
    called.

    Args:
        layer: From whose forward this is called.
        parameter: What it uses; if it is here, or not DeepSpeed's, it is left alone.
    """
    if is_partitioned(parameter) and is_sharded(parameter):
        import deepspeed

        deepspeed.zero.register_external_parameter(layer, parameter)
        parameter.all_gather()  # type: ignore[attr-defined]


class Way(enum.Enum):
    """The ways in which an adapted layer gets the result of its base layer's call."""

    DIRECT = enum.auto()
    """By a product of our own."""
    HOOKED = enum.auto()
    """The same, between the base layer's hooks."""
    OWN = enum.auto()
    """By the base layer's own forward, with another weight."""


def way_to_call(module: nn.Module, known: Collection[Callable[..., Any]] | None) -> Way:
    """Return how to call a base layer.

    Args:
        module: The base layer.
        known: The forwards for which there is a product; None: for whatever it has.
    """
    own = module.__dict__
    if known is not None:
        if "forward" not in own:
            if type(module).forward not in known:
                return Way.OWN
        # Set on the module itself, it is another one, unless Accelerate wrapped it.
        elif "_hf_hook" not in own or getattr(own["_old_forward"], "__func__", None) not in known:
            return Way.OWN
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in own
    )
    return Way.HOOKED if hooked else Way.DIRECT


def has_hooks_of_users(module: nn.Module) -> bool:
    """Return whether the module has hooks, beside those that gather weights (FSDP2, DeepSpeed)."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_MACHINERY)
        for name in _HOOKS
        for hook in getattr(module, name).values()
    )


def call_with_hooks(
    module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a module, hooks and all, with ``forward`` in the place of its own.

    Accelerate wraps a module's forward and keeps the original as ``_old_forward``; its wrapper
    then counts among the hooks.
    """
    with _swapping:
        own, place = module.__dict__, _place_of_forward(module)
        return _with_entry(own, place, forward, module, *args, **kwargs)


def call_with_weight(
    module: nn.Module, weight: Callable[[], Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module, its own forward and hooks, with another weight.

    Args:
        module: The base layer.
        weight: Makes the weight, once the hooks before the forward have run.
        *args: For the module.
        **kwargs: The same.
    """
    with _swapping:
        forward = getattr(module, _place_of_forward(module))

        def with_weight(*args: Any, **kwargs: Any) -> Any:
            # FSDP1 has a plain attribute in the place of the parameter.
            entries = module._parameters if "weight" in module._parameters else module.__dict__
            return _with_entry(entries, "weight", weight(), forward, *args, **kwargs)

        if way_to_call(module, None) is Way.DIRECT:
            return with_weight(*args, **kwargs)
        return call_with_hooks(module, with_weight, *args, **kwargs)


def _place_of_forward(module: nn.Module) -> str:
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def _with_entry(
    entries: dict[str, Any], name: str, value: Any, call: Callable[..., Any], *args: Any, **kw: Any
) -> Any:
    """Return ``call(*args, **kw)``, while ``entries[name]`` is ``value``, and put that back."""
    put_back = (
        partial(entries.__setitem__, name, entries[name])
        if name in entries
        else partial(entries.pop, name, None)
    )
    try:
        entries[name] = value
        result = call(*args, **kw)
    except BaseException:
        put_back()  # one call into C, so no interrupt leaves half of it
        raise
    put_back()
    return result
