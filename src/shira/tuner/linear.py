# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Linear`` and transformers' ``Conv1D``: `Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shira import ops
from shira.errors import TargetError
from shira.support import Support
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer


class Linear(ShiraLayer, nn.Module):  # type: ignore[misc]
    """SHiRA in a linear layer, its weight stored ``[out, in]`` or (``Conv1D``) ``[in, out]``."""

    def __init__(
        self,
        base_layer: nn.Module,
        support: Support,
        adapter_name: str,
        config: ShiraConfig,
        r: int,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        ShiraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = is_conv1d(base_layer)
        if self.fan_in_fan_out:
            self.in_features, self.out_features = self.out_features, self.in_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, support, r, config=config)

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        elif self.quantization_backend is None and x.dtype != base.weight.dtype:
            raise TargetError(
                f"the input is {x.dtype} but the weight is {base.weight.dtype}; cast one of them, "
                "or use torch.autocast"
            )
        if self.quantization_backend is not None:
            # The packed weight stays as it is: the delta alone, on a weight of zeros that takes
            # no memory, is added to what the base layer computes.
            zeros = x.new_zeros(()).expand(self.weight_shape)
            return self._base_forward(x) + ops.linear(x, zeros, None, deltas, indices)
        return ops.linear(
            x, base.weight, base.bias, deltas, indices, transposed=self.fan_in_fan_out
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer with its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
