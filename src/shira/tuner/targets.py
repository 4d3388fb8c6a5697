# SPDX-License-Identifier: Apache-2.0
"""What ``target_modules`` matches, checked before anything of the model is touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable

from torch import nn

from shira.errors import TargetError, did_you_mean
from shira.tuner.config import ShiraConfig
from shira.tuner.masking import weight_of


def warn_of_idle_names(config: ShiraConfig, module_names: Iterable[str]) -> None:
    """Warn of each name in a list of target modules that matches no module."""
    if isinstance(config.target_modules, str) or not config.target_modules:
        return
    names = list(module_names)
    parts = {part for name in names for part in name.split(".")} | set(names)
    for target in sorted(config.target_modules):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            warnings.warn(
                f"target_modules: {target!r} matches no module of the model."
                f"{did_you_mean(target, parts)}",
                stacklevel=2,
            )


def nothing_matched(config: ShiraConfig, module_names: Iterable[str], cause: str) -> TargetError:
    """The error for a configuration that matches nothing at all, naming near modules."""
    targets = config.target_modules
    names = [name for name in module_names if name]
    tails = {name.rpartition(".")[2] for name in names}
    wanted = re.findall(r"\w+", targets) if isinstance(targets, str) else sorted(targets or ())
    hints = {hint for target in wanted if (hint := did_you_mean(target, tails | set(names)))}
    return TargetError(f"{cause}{''.join(sorted(hints))}")


def refuse_shared_weights(
    modules: Iterable[tuple[str, nn.Module]], supported: Callable[[nn.Module], bool]
) -> None:
    """Two targets with one weight between them cannot each have their own entries in it.

    Raises:
        TargetError: If two of the modules share their weight's memory.
    """
    seen: dict[tuple[int, int], str] = {}
    for name, module in modules:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if not supported(base):
            continue
        weight = weight_of(base)
        if weight.is_meta or not weight.numel():
            continue
        place = (weight.data_ptr(), weight.numel())
        if place in seen:
            raise TargetError(
                f"{seen[place]!r} and {name!r} share one weight (tied weights), so two adapters on "
                f"it would contradict each other once merged; target one of them, for instance by "
                f"exclude_modules=[{name!r}]"
            )
        seen[place] = name
