# SPDX-License-Identifier: Apache-2.0
"""The base model's values under an adapter's entries, where they can be read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shira.support import Support
from shira.tuner.quantized import backend_of


def base_values(layer: nn.Module, support: Support) -> Tensor | None:
    """``(k,)`` values of a layer's weight, in its dtype and on its device.

    Args:
        layer: The base layer, or an adapted one.
        support: On a weight of that shape.

    Returns:
        None where the values are not there as numbers: on the meta device, packed by quantization,
        or partitioned over processes.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if (
        weight.is_meta
        or backend_of(layer) is not None
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
