# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Conv2d``: `Conv2d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shira import ops
from shira.support import Support
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer


class Conv2d(ShiraLayer, nn.Module):  # type: ignore[misc]
    """SHiRA in a 2-D convolution, its weight stored ``[out, in / groups, kh, kw]``."""

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
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, support, r, config=config)

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
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
