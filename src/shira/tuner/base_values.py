# SPDX-License-Identifier: Apache-2.0
"""The base model's values under an adapter's entries, where they can be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shira.store.sharded import is_sharded
from shira.support import Support
from shira.tuner.elsewhere import readable
from shira.tuner.quantized import backend_of


def base_values(layer: nn.Module, support: Support) -> Tensor | None:
    """``(k,)`` values of a layer's weight, in its dtype and on its device.

    Args:
        layer: The base layer, or an adapted one.
        support: On a weight of that shape.

    Returns:
        None where the values are not there as numbers: on the meta device, or packed by
        quantization. What Accelerate has offloaded or ZeRO-3 has partitioned is fetched, weight by
        weight.
    """
    base: Any = layer
    base = base.get_base_layer() if hasattr(base, "get_base_layer") else base
    if backend_of(base) is not None:
        return None
    with readable(base):
        return _values(base.weight, support)


def _values(weight: Tensor, support: Support) -> Tensor | None:
    if (
        weight.is_meta
        or is_sharded(weight)
        or not weight.is_floating_point()
        or weight.shape != torch.Size(support.shape)
    ):
        return None
    flat = support.indices.to(weight.device)
    if weight.is_contiguous():
        return weight.detach().view(-1).index_select(0, flat)
    flat, index = flat.long(), []
    for size in reversed(support.shape):
        index.append(flat % size)
        flat = flat // size
    return weight.detach()[tuple(reversed(index))]
