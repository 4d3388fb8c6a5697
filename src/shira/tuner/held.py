# SPDX-License-Identifier: Apache-2.0
"""Reading a module's parameters and submodules on the short way, at each call of a layer: `held`.

``module.weight`` is first looked for, in vain, as an ordinary attribute and then found by
``nn.Module.__getattr__``: a microsecond a name, which a layer's call paid twenty times over. What
is read is not kept for the next call, so there is nothing to invalidate: a parameter, a scale, a
hook or a base layer that was changed, in whatever way, counts from the next call on.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def held(module: nn.Module, *names: str) -> list[Any]:
    """``[getattr(module, name), ...]``, quick for parameters and submodules."""
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
