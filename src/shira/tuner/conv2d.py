# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Conv2d``: `Conv2d`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shira import ops
from shira.tuner.held import held
from shira.tuner.hooks import Way
from shira.tuner.layer import ShiraLayer

_CONV_FORWARD = nn.Conv2d._conv_forward


class Conv2d(ShiraLayer):
    """SHiRA in a 2-D convolution, its weight stored ``[out, in / groups, kh, kw]``."""

    known_forwards = frozenset({nn.Conv2d.forward})

    def _way(self, base: Any) -> Way:
        return super()._way(base) if type(base)._conv_forward is _CONV_FORWARD else Way.OWN

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        weight, bias = held(base, "weight", "bias")
        x = self._cast_input(x, weight)
        padding = [0, 0]
        if base.padding_mode != "zeros" or isinstance(base.padding, str):
            # as nn.Conv2d itself does for padding other than a number of zeros
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        else:
            padding = list(base.padding)
        return ops.conv2d(
            x,
            weight,
            bias,
            deltas,
            indices,
            stride=base.stride,
            padding=padding,
            dilation=base.dilation,
            groups=base.groups,
        )
