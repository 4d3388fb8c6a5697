# SPDX-License-Identifier: Apache-2.0
"""PEFT's operations on a model happen as a whole, or, if they fail or are interrupted, not at all.

A layer undoes what it was itself in the middle of (`shira.ops.resident`); this is for the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import onload_layer
from torch import nn

from shira.tuner.layer import ShiraLayer

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def as_it_was(model: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[None]:
    """Put a model's modules, parameters and settings back if the body raises.

    What modules hold is put back: submodules, parameters and their ``requires_grad``, modes,
    configurations, hooks. The values of tensors are not: who writes to them checks before.
    All this only if the model then has a module of this ``kind``.
    """
    copies: list[tuple[Any, Any]] = []
    for module in model.modules():
        settings = module.__dict__
        copies.append((settings, settings.copy()))
        copies += [(v, v.copy()) for v in settings.values() if type(v) in _CONTAINERS]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if not any(isinstance(module, kind) for module in model.modules()):
            raise
        for container, before in copies:
            container.clear()
            if isinstance(container, list):
                container.extend(before)
            else:
                container.update(before)
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        raise


def merges_of(model: nn.Module) -> Callable[[], None]:
    """Return what puts a model's layers back, and into each what is merged into it now."""
    modules = list(model.modules())
    children = [(module._modules, module._modules.copy()) for module in modules]
    merged = [(m, list(m.merged_adapters)) for m in modules if isinstance(m, ShiraLayer)]

    def restore() -> None:
        for modules, before in children:
            modules.update(before)
        for layer, names in merged:
            if layer.merged_adapters != names:
                with onload_layer(layer):
                    layer.merge_only(names)

    return restore
