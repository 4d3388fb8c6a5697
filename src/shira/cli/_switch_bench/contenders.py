# SPDX-License-Identifier: Apache-2.0
"""What is timed: `Switch`, the least it could do, and PEFT's SHiRA and LoRA on the same weights.

PEFT has no switch of its own: leaving an adapter is `unmerge`, entering one is `merge`. Both are
called on the layer itself, without the walk over the model that PEFT's own calls make besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shira.delta import Adapter, SparseDelta
from shira.ops import native
from shira.switch import Switch


class Ours:
    """A `Switch` with two adapters, ``a`` and ``b``.

    Args:
        module: With the adapters' parameters.
        adapters: By name.
    """

    def __init__(self, module: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.module = module
        self.switch = Switch(module)
        self.names = list(adapters)
        for name, adapter in adapters.items():
            self.switch.load(name, adapter, check_base=False)

    def there_and_back(self) -> None:
        """In with the first adapter and out again: what PEFT's merge and unmerge are."""
        self.switch.activate(self.names[0])
        self.switch.deactivate()

    def onwards(self) -> None:
        """From the adapter that is in to the next one."""
        now = next(iter(self.switch.active), self.names[-1])
        at = self.names.index(now)
        self.switch.activate(self.names[(at + 1) % len(self.names)])


class Limit:
    """Reading and writing one word of each cache line that an adapter touches, twice.

    And reading as many bytes beside it as the offsets, originals and replacement values have.

    Args:
        weights: Each with the lines that are touched and the bytes that are read beside it.
    """

    def __init__(self, weights: list[tuple[Tensor, Tensor, int]]) -> None:
        kernels = native.load().library
        assert kernels is not None
        self.kernels = kernels
        most = max((size for *_, size in weights), default=0)
        self.stream = torch.zeros(most // 8 + 1, dtype=torch.int64)
        self.weights = [(w, lines, self.stream[: size // 8]) for w, lines, size in weights]

    def once(self) -> None:
        """One walk over all weights."""
        for weight, lines, stream in self.weights:
            self.kernels.touch(weight.data, lines, stream)

    def twice(self) -> None:
        """Two, as there and back takes."""
        self.once()
        self.once()


def peft_shira(linear: nn.Linear, delta: SparseDelta) -> MergeAndUnmerge:
    """PEFT's own SHiRA with these entries and values on a layer; one run is merge and unmerge."""
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=1, target_modules=["layer"])
    config.mask_fn = _first_entries  # its own takes seconds; these are replaced at once
    model = ShiraModel(nn.ModuleDict({"layer": linear}), {"default": config}, "default")
    layer = model.model["layer"]
    values = delta.values.to(linear.weight.dtype)  # as PEFT keeps them
    layer.shira_weight["default"] = nn.Parameter(values, requires_grad=False)
    layer.shira_indices["default"] = delta.support.coordinates()
    return MergeAndUnmerge(layer)


def shira_in_peft(linear: nn.Linear, delta: SparseDelta) -> MergeAndUnmerge:
    """The same with shira's layers, which PEFT calls in the place of its own."""
    from shira.tuner import ShiraConfig, ShiraModel

    config = ShiraConfig(target_modules=["layer"])
    config.mask_fn = lambda base_layer, r, **kwargs: delta.support
    config.density = delta.support.density
    model = ShiraModel(nn.ModuleDict({"layer": linear}), {"default": config}, "default")
    layer = model.model["layer"]
    with torch.no_grad():
        layer.shira_weight["default"].copy_(delta.values)
    return MergeAndUnmerge(layer)


def _first_entries(base_layer: nn.Module, r: int, **kwargs: object) -> Tensor:
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    mask = torch.zeros_like(weight)
    mask.view(-1)[: r * sum(weight.shape)] = 1
    return mask


def peft_lora(linear: nn.Linear, r: int) -> MergeAndUnmerge:
    """PEFT's LoRA of a rank on a layer; one run is merge (fuse) and unmerge (unfuse)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights=False)
    model = get_peft_model(nn.ModuleDict({"layer": linear}), config)  # type: ignore[arg-type]
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(0.01)
    return MergeAndUnmerge(layer)


class MergeAndUnmerge:
    """Merging and unmerging a layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self) -> None:
        with torch.no_grad():
            self.layer.merge()
            self.layer.unmerge()


def linear_around(weight: Tensor) -> nn.Linear:
    """A linear layer on this very memory."""
    rows, cols = weight.shape
    linear = nn.Linear(cols, rows, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
