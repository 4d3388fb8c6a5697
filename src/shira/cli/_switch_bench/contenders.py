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

from shira.adapter import Adapter
from shira.cli._switch_bench.scene import touched_lines
from shira.delta import SparseDelta
from shira.errors import MissingDependencyError
from shira.ops import native
from shira.ops.patch import Patch
from shira.switch import Switch
from shira.switch.targets import Target


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

    def patches(self, number: int) -> Mapping[Target, Patch]:
        """What an adapter writes, by weight."""
        with self.switch.using(self.names[number]):
            return self.switch._weights.state.plan

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
    """The least that switching could do: one word of each touched cache line, read and written.

    Beside it as many bytes are read as the offsets, originals and replacement values have.

    Args:
        ours: Whose adapters are meant; the first and the second one.

    Raises:
        MissingDependencyError: If there are no compiled kernels to measure it with.
    """

    def __init__(self, ours: Ours) -> None:
        loaded = native.load()
        if loaded.library is None:
            raise MissingDependencyError(loaded.why)
        self.kernels = loaded.library
        first, second = ours.patches(0), ours.patches(min(1, len(ours.names) - 1))
        self._first = [_walk(target.weight, [patch]) for target, patch in first.items()]
        self._both = [
            _walk(target.weight, [p[target] for p in (first, second) if target in p])
            for target in {**first, **second}
        ]
        longest = max(words for *_, words in self._both)
        self._stream = torch.zeros(longest, dtype=torch.int64)

    def there_and_back(self) -> None:
        """Two walks over what the first adapter touches."""
        self._run(self._first)
        self._run(self._first)

    def onwards(self) -> None:
        """One over what the first or the second one touches."""
        self._run(self._both)

    def _run(self, walks: list[tuple[Tensor, Tensor, int]]) -> None:
        for weight, lines, words in walks:
            self.kernels.touch(weight.data, lines, self._stream[:words])


def _walk(weight: Tensor, patches: list[Patch]) -> tuple[Tensor, Tensor, int]:
    """A weight, which of its lines patches touch, and the 8-byte words in the patches."""
    tensors = [t for patch in patches for t in (patch.offsets, patch.originals, patch.replacement)]
    words = sum(t.numel() * t.element_size() for t in tensors) // 8
    return weight, touched_lines(weight, *(patch.offsets for patch in patches)), words


def peft_shira(
    linear: nn.Linear, delta: SparseDelta, dtype: torch.dtype = torch.float32
) -> MergeAndUnmerge:
    """PEFT's own SHiRA with these entries and values on a layer; one run is merge and unmerge.

    Args:
        linear: The layer.
        delta: The entries.
        dtype: Of the values. `get_peft_model` makes them float32 unless told not to.
    """
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=1, target_modules=["layer"])
    config.mask_fn = _first_entries  # type: ignore[assignment]  # its own takes seconds; these are replaced at once
    model = ShiraModel(nn.ModuleDict({"layer": linear}), {"default": config}, "default")
    layer = model.model["layer"]
    layer.shira_weight["default"] = nn.Parameter(delta.values.to(dtype), requires_grad=False)
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
    layer.shira_weight["default"] = nn.Parameter(delta.values.clone(), requires_grad=False)
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
    model: Any = get_peft_model(nn.ModuleDict({"layer": linear}), config)  # type: ignore[arg-type]
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
