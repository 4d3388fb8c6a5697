# SPDX-License-Identifier: Apache-2.0
"""Hooks of a base layer whose own forward is not called: they run all the same.

An adapted layer multiplies with the base layer's weight itself. Users, Accelerate's offloading and
FSDP hang hooks on the base layer and expect them to fire, with the base layer as the module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from shira.ops.memory import keep_over_fork

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_MACHINERY = ("torch.distributed.", "deepspeed.")

_swapping = threading.RLock()
keep_over_fork(_swapping)


def has_hooks(module: nn.Module, of_users: bool = False) -> bool:
    """Whether calling the module would run more than its forward.

    Args:
        module: The base layer.
        of_users: Count hooks alone, not what Accelerate has wrapped around the forward, nor the
            hooks by which FSDP2 and DeepSpeed gather weights.
    """
    if not of_users:
        return bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "_hf_hook" in module.__dict__
        )
    return any(
        not str(getattr(hook, "__module__", "")).startswith(_MACHINERY)
        for name in _HOOKS
        for hook in getattr(module, name).values()
    )


def call_with_hooks(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``module(x)``, hooks and all, with ``forward`` in the place of the module's own.

    Accelerate wraps a module's forward and keeps the original as ``_old_forward``; its wrapper
    then counts among the hooks.
    """
    attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    with _swapping:
        own = module.__dict__
        kept = own.get(attribute)
        put_back = (
            partial(own.pop, attribute, None)
            if kept is None
            else partial(own.__setitem__, attribute, kept)
        )
        try:
            own[attribute] = forward
            result: Tensor = module(x)
        except BaseException:
            put_back()  # one call into C, so no interrupt leaves half of it
            raise
        put_back()
        return result
