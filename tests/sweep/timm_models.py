# SPDX-License-Identifier: Apache-2.0
"""Model classes of timm: the smallest architecture of each of its modules and classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from tests.sweep.building import first_that_runs, linear_layers

VERSION = timm.__version__
SMALL = re.compile(
    r"^test_|atto|femto|pico|nano|tiny|xxs|xx?small|_mini|_s0|_b0|_t0|_050|_t$|_n$|18"
)

SIZES: tuple[dict[str, Any], ...] = (
    {"img_size": 96, "depth": 2, "embed_dim": 48, "num_heads": 4},
    {"img_size": 96, "depths": (1, 1, 1, 1), "embed_dim": 32},
    {"img_size": 96},
    {},
)


def names() -> list[str]:
    """Return ``module:architecture``, the one that looks smallest of each module."""
    modules: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        modules.setdefault(module, []).append(name)
    return sorted(f"{module}:{min(found, key=_size)}" for module, found in modules.items())


def _size(name: str) -> tuple[bool, bool, int, str]:
    return not name.startswith("test_"), not SMALL.search(name), len(name), name


def is_first(name: str) -> bool:
    """Return True: each class is of its own kind."""
    return True


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any], Any]:
    """Build a model of an architecture; as `transformers_models.build`."""
    architecture = name.partition(":")[2]

    def make(options: dict[str, Any]) -> nn.Module:
        return timm.create_model(architecture, pretrained=False, num_classes=10, **options)

    def inputs(model: Any) -> Any:
        _, side, _ = model.default_cfg["input_size"]
        for size in dict.fromkeys((min(side, 96), side)):
            yield {"x": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}

    model, run = first_that_runs(SIZES, make, inputs)
    return model, run, linear_layers(model)
