# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Linear`` and transformers' ``Conv1D``: `Linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shira import ops
from shira.tuner.grouped import grouped_linear
from shira.tuner.held import held
from shira.tuner.layer import ShiraLayer
from shira.tuner.quantized import can_unpack, quantized_linear


class Linear(ShiraLayer):
    """SHiRA in a linear layer, its weight stored ``[out, in]`` or (``Conv1D``) ``[in, out]``."""

    known_forwards = frozenset({nn.Linear.forward, Conv1D.forward})

    def _stores_input_first(self) -> bool:
        return is_conv1d(self.get_base_layer())

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        weight, bias = held(base, "weight", "bias")
        x = self._cast_input(x, weight)
        backend = self.quantization_backend
        if backend is not None and can_unpack(backend):
            result: Tensor = quantized_linear(x, base, backend, deltas, indices)
            return result
        if backend is not None:
            # A weight that cannot be unpacked (GPTQ, AWQ, ...): the delta alone, on a weight of
            # zeros that takes no memory, is added to what the base layer computes.
            zeros = x.new_zeros(()).expand(self.weight_shape)
            delta = ops.linear(x, zeros, None, deltas, indices)
            return delta + self._base_forward(x)  # type: ignore[no-any-return]
        return ops.linear(x, weight, bias, deltas, indices, transposed=self.fan_in_fan_out)

    def _grouped_forward(self, x: Tensor, groups: dict[str, list[int]]) -> Tensor | None:
        return grouped_linear(self, x, groups)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer with its weight transposed."""
    return isinstance(module, Conv1D)
