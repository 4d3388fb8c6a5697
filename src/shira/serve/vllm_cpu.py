# SPDX-License-Identifier: Apache-2.0
"""`PackedBase`: vLLM's CPU backend multiplies with the weights that a switch can write to.

By itself it packs the weights of linear layers and experts for its kernels, and drops or bypasses
the plain ones. Importing this module, before a model is loaded, keeps them plain: products are
torch's own, those of experts one expert after the other. vLLM's are the faster ones: for 16 tokens
in float32 torch's took 1.3 to 1.8 times as long.

With ``SHIRA_PACKED=on`` a linear layer keeps vLLM's packed copy beside its weight, twice the
memory, and computes with that as long as the weight holds the base: what the base answers has plain
vLLM's speed and bits, and so has the base's product below adapters that ride (`shira.serve.mixed`).
Compiled models compute with the weights themselves: start the engine with ``--enforce-eager``. Runs
inside vLLM (made and tested for 0.32).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

from shira.checkpoints.boxes import storage_key
from shira.errors import ConfigError, ServeError
from shira.serve.placement import Storage

_linear: Any = nn.functional.linear


class PackedBase:
    """A layer's product, with a packed copy of its weight while that holds the base."""

    def __init__(self, weight: Tensor, product: Callable[..., Tensor]) -> None:
        self.weight, self.product = weight, product
        self.changed = False  # by adapters
        self.version = weight._version

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x weight^T + bias``."""
        # a graph would hold on to the way that was taken when it was made
        holds_base = not torch.compiler.is_compiling() and not self.changed
        if not holds_base or weight is not self.weight or not self.is_current():
            return _linear(x, weight, bias)  # type: ignore[no-any-return]
        return self.product(x, weight, bias)

    def is_current(self) -> bool:
        """Return whether nobody else has written to the weight since it was packed."""
        return self.weight._version == self.version


_PACKED: WeakSet[PackedBase] = WeakSet()


def packs_apart(layer: nn.Module) -> bool:
    """Return whether a layer computes with a packed copy whatever its weight holds."""
    product = getattr(layer, "cpu_linear", _linear)
    return product is not _linear and not isinstance(product, PackedBase)


@contextmanager
def writing(
    touched: Collection[Storage], changed: Callable[[], Collection[Storage]]
) -> Iterator[None]:
    """Note a write to weights: ``changed()`` are those without the base's values after it."""
    keys = {storage.key for storage in touched}
    packed = {each: key for each in _PACKED if (key := storage_key(each.weight)) in keys}
    current = [each for each in packed if each.is_current()]
    for each in packed:
        each.changed = True
    try:
        yield
    finally:
        keys = {storage.key for storage in changed()}
        for each, key in packed.items():
            each.changed = key in keys
        for each in current:
            each.version = each.weight._version


def pack_again(model: nn.Module) -> None:
    """Pack what the weights hold now, after they were loaded anew."""
    for layer in model.modules():
        if isinstance(getattr(layer, "cpu_linear", None), PackedBase):
            _dispatch(layer, False)


def _dispatch(layer: Any, remove_weight: bool) -> None:
    """Take the place of vLLM's ``dispatch_cpu_unquantized_gemm``."""
    layer.cpu_linear = _linear
    if not _packing or layer.weight.dim() != 2 or layer.weight.is_meta:
        return
    bias = getattr(layer, "bias", None)
    given = None if bias is None else bias.data
    _pack(layer, False)
    if bias is not None and given is not None and bias.dtype != given.dtype:
        bias.data, layer.cpu_linear = given, _linear  # a kernel of small layers wants another
        return
    layer.cpu_linear = PackedBase(layer.weight, layer.cpu_linear)
    _PACKED.add(layer.cpu_linear)


def _told_to_pack() -> bool:
    told = os.environ.get("SHIRA_PACKED", "off").lower()
    if told not in ("on", "off"):
        raise ConfigError(f"SHIRA_PACKED is on or off, not {told!r}")
    return told == "on"


def _compute_with_experts() -> None:
    """Have vLLM's CPU backend multiply with the experts' weights themselves, of one after another.

    Experts with clamped activations, whose halves it interleaves before it packs them (GPT-OSS),
    are left to it, and their adapters are refused.
    """
    from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    kind: Any = cpu_moe.CPUUnquantizedExperts
    pack, packed = kind.process_weights_after_loading, kind.apply

    def keep(self: Any, layer: nn.Module) -> None:
        self._shira_plain = str(self.moe_config.activation.value) != "swigluoai"
        if not self._shira_plain:
            pack(self, layer)

    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *rest: Any,
        apply_router_weight_on_input: bool = False,
        **named: Any,
    ) -> None:
        if not self._shira_plain:
            given = (w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map)
            named["apply_router_weight_on_input"] = apply_router_weight_on_input
            packed(self, output, hidden_states, *given, *rest, **named)
            return
        ids = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()]
        total = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        for expert in torch.unique(ids).tolist():
            if expert < 0:  # on another rank
                continue
            token, choice = (ids == expert).nonzero(as_tuple=True)
            biases = (
                bias if bias is None else bias[expert] for bias in (self.w1_bias, self.w2_bias)
            )
            first, second = biases
            both = _linear(hidden_states[token], w1[expert], first)
            active = both.new_empty(len(both), both.shape[-1] // 2)
            apply_moe_activation(activation, active, both)
            result = _linear(active, w2[expert], second).float()
            if not apply_router_weight_on_input:
                result *= topk_weights[token, choice, None]
            total.index_add_(0, token, result)
        output.copy_(total)

    kind.process_weights_after_loading, kind.apply = keep, apply


if current_platform.is_cpu():
    from vllm.model_executor.layers import utils

    if not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise ServeError("this release of vLLM packs CPU weights in a way that shira does not know")
    _packing = _told_to_pack()
    _pack, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, _dispatch
    _compute_with_experts()
