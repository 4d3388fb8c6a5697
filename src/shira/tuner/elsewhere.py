# SPDX-License-Identifier: Apache-2.0
"""Parameters that are not where they look: offloaded, partitioned by ZeRO-3, or computed.

Accelerate's offloading (``device_map`` with ``cpu`` or ``disk``) leaves parameters on the meta
device and brings them when the module that holds them is called; ZeRO-3 gathers them then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from shira.errors import TargetError
from shira.store.sharded import gathered


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """While the context lasts, a module's own parameters can be read, wherever they are kept."""
    parameters = list(module.parameters(recurse=False))
    away = any(parameter.is_meta for parameter in parameters)
    here = align_module_device(module) if away else nullcontext()
    with here, gathered(parameters), at_rest([module]):
        yield


@contextmanager
def at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While the context lasts, reading a computed weight changes nothing.

    spectral_norm improves its estimate, a buffer, at each reading in training mode.
    """
    computing = [
        m._modules["parametrizations"] for m in modules if "parametrizations" in m._modules
    ]
    training = [part for some in computing if some is not None for part in some.modules()]
    training = [part for part in training if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def is_computed(base_layer: nn.Module) -> bool:
    """Return whether the layer's weight is made from other parameters at each use.

    By ``torch.nn.utils.parametrize`` (weight_norm, spectral_norm, orthogonal), or by a hook before
    the forward (the older weight_norm and spectral_norm, pruning).
    """
    parametrizations = base_layer._modules.get("parametrizations")
    parametrized = parametrizations is not None and "weight" in parametrizations._modules
    made = parametrized or any(name.startswith("weight_") for name in base_layer._parameters)
    return made and "weight" not in base_layer._parameters


def device_of_work(module: nn.Module) -> torch.device | None:
    """Where the parameters of an offloaded module are brought to; None if it is not offloaded."""
    if not has_offloaded_params(module):
        return None
    hook: Any = module._hf_hook
    device: Any = hook.execution_device
    return torch.device("cpu" if device is None else device)


def fetched(values: nn.ParameterDict, name: str, what: str) -> Tensor:
    """An adapter's values, brought from where Accelerate has put them.

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
