# SPDX-License-Identifier: Apache-2.0
"""Model classes of transformers: all that its tables of automatic classes name, built small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.sweep.building import NotBuilt, first_that_runs
from tests.sweep.inputs import candidates
from tests.sweep.overrides import OVERRIDES
from tests.sweep.shrinking import PROFILES, Profile, shrink

VERSION = transformers.__version__


def names() -> list[str]:
    """Return the names of all model classes, sorted."""
    found: set[str] = set()
    for table, models in vars(modeling_auto).items():
        if table.startswith("MODEL") and table.endswith("MAPPING_NAMES"):
            for classes in models.values():
                found |= {classes} if isinstance(classes, str) else set(classes)
    return sorted(name for name in found if name)


def is_first(name: str) -> bool:
    """Return whether no class of a shorter name has the same type of configuration."""
    return name in _first_of_each_type()


@functools.cache
def _first_of_each_type() -> set[str]:
    first: dict[str, str] = {}
    for table, models in vars(modeling_auto).items():
        if table.startswith("MODEL") and table.endswith("MAPPING_NAMES"):
            for kind, classes in models.items():
                all_of_kind = [classes] if isinstance(classes, str) else list(classes)
                known = [first[kind]] if kind in first else []
                first[kind] = min(filter(None, [*all_of_kind, *known]), key=lambda n: (len(n), n))
    return set(first.values())


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any], Any]:
    """Build a small model of a class.

    Returns:
        The model, what runs a model on inputs that fit it, and the ``target_modules`` that mean
        all its linear layers.

    Raises:
        NotBuilt: If no profile gives a model that runs.
    """
    try:
        model_class = getattr(transformers, name)
        config_class = model_class.config_class
    except Exception as error:
        raise NotBuilt(f"import: {error}") from error
    if config_class is None:
        raise NotBuilt("no configuration class")
    changes = _changes(name, config_class.model_type)
    model, run = first_that_runs(
        PROFILES, lambda profile: model_class(config_of(config_class, profile, changes)), candidates
    )
    return model, run, "all-linear"


def config_of(config_class: Any, profile: Profile, changes: dict[str, Any]) -> Any:
    """Return the default configuration of a class in small sizes."""
    try:
        default = config_class()
    except Exception:
        default = config_class(**changes)
    small = shrink(default.to_dict(), profile, **changes)
    for key in ("transformers_version", "architectures", "model_type", "dtype"):
        small.pop(key, None)
    config = config_class(**small)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def _changes(name: str, model_type: str) -> dict[str, Any]:
    return OVERRIDES.get(model_type, {}) | OVERRIDES.get(name, {})


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
