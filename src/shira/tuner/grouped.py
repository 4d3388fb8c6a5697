# SPDX-License-Identifier: Apache-2.0
"""A mixed batch through one layer: the base once for all samples, each group's delta on top.

For ``adapter_names=``. Instead of a product with the whole weight for each adapter there is one,
and each adapter adds its k entries to the samples that want it:

- linear layers: ``y_g += x_g dW_g^T``, O(tokens of the group * k); see `shira.ops.sparse_product`
  for how its rounding differs from the merged weight's;
- embeddings: the entries of the rows that were looked up are replaced, O(tokens * k / rows), which
  is the merged table's look-up bit for bit.

Convolutions go group by group, and so do layers with hooks on their base layer, which are to see
one adapted product; and linear layers whose groups are long, where the product with the adapter
inside the weight is the cheaper one (`WHOLE_PRODUCT_FROM`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shira import ops
from shira.base import replacement
from shira.tuner.hooks import Way
from shira.tuner.masking import weight_of

if TYPE_CHECKING:
    from shira.tuner.layer import ShiraLayer

WHOLE_PRODUCT_FROM = 256
"""Tokens of a group from which one product with the whole weight beats base and delta apart.

A product with the adapter inside the weight costs its scatter and restore, O(k), once; base and
delta apart cost O(tokens * k) more. Measured on two CPU cores (``python -m benchmarks
mixed_batch``)."""


def grouped_linear(layer: ShiraLayer, x: Tensor, groups: dict[str, list[int]]) -> Tensor | None:
    """A linear layer's forward for a mixed batch.

    Args:
        layer: Adapted ``nn.Linear`` or ``Conv1D``, quantized or not.
        x: ``(samples, ..., in)``.
        groups: ``{adapter name: its samples}``; a name that the layer lacks is the base.

    Returns:
        ``(samples, ..., out)``, or None: go through the groups one by one.
    """
    adapted = {name: samples for name, samples in groups.items() if name in layer.shira_weight}
    tokens = x[0, ..., 0].numel() if len(x) else 0
    longest = tokens * max(map(len, adapted.values()), default=0)
    if layer._way(layer.base_layer) is not Way.DIRECT or longest >= WHOLE_PRODUCT_FROM:
        return None
    x = layer._cast_input(x, weight_of(layer.get_base_layer()))
    result = _own(layer._base_forward(x))
    for name, samples in adapted.items():
        at = torch.tensor(samples, device=x.device)
        inputs = x.index_select(0, at)  # (samples of the group, ..., in)
        added = ops.sparse_product(
            inputs.reshape(-1, inputs.shape[-1]),
            layer._delta(name),
            layer.shira_indices.kept(name),
            layer.weight_shape,
            transposed=layer.fan_in_fan_out,
        )
        outputs = result.index_select(0, at)
        # in the wide dtype of `added`, rounded once
        outputs = (outputs + added.view(outputs.shape)).to(result.dtype)
        result = result.index_copy_(0, at, outputs)
    return result


def grouped_embedding(
    layer: ShiraLayer, ids: Tensor, groups: dict[str, list[int]]
) -> Tensor | None:
    """An embedding's forward for a mixed batch. Arguments and result as `grouped_linear`."""
    if layer._way(layer.base_layer) is not Way.DIRECT:
        return None
    base: Any = layer.get_base_layer()
    result = _own(F.embedding(ids, base.weight, base.padding_idx))  # (samples, ..., dim)
    for name, samples in groups.items():
        if name not in layer.shira_weight:
            continue
        at = torch.tensor(samples, device=ids.device)
        wanted = ids.index_select(0, at).reshape(-1)
        place, entry = ops.looked_up(wanted, layer.shira_indices.kept(name), layer.weight_shape)
        delta = layer._delta(name).index_select(0, entry)
        if base.padding_idx is not None and delta.requires_grad:  # that row gets no gradient
            row = layer.shira_indices[name][0].index_select(0, entry)
            delta = torch.where(row == base.padding_idx, delta.detach(), delta)
        rows = result.index_select(0, at)  # (samples of the group, ..., dim)
        flat = rows.view(-1)
        new = replacement(flat.index_select(0, place), delta)
        rows = flat.index_copy(0, place, new).view(rows.shape)
        result = result.index_copy_(0, at, rows)
    return result


def _own(result: Tensor) -> Tensor:
    """Memory that may be written to: what autograd has seen is copied."""
    return result.clone() if result.requires_grad else result
