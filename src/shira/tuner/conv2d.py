# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Conv2d``: `Conv2d`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from shira import ops
from shira.tuner.layer import ShiraLayer


class Conv2d(ShiraLayer):
    """SHiRA in a 2-D convolution, its weight stored ``[out, in / groups, kh, kw]``."""

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        x = self._cast_input(x, base.weight)
        padding = [0, 0]
        if base.padding_mode != "zeros" or isinstance(base.padding, str):
            # as nn.Conv2d itself does for padding other than a number of zeros
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        else:
            padding = list(base.padding)
        return ops.conv2d(
            x,
            base.weight,
            base.bias,
            deltas,
            indices,
            stride=base.stride,
            padding=padding,
            dilation=base.dilation,
            groups=base.groups,
        )
