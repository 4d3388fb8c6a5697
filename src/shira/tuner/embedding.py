# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Embedding``: `Embedding`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shira import ops
from shira.tuner.grouped import grouped_embedding
from shira.tuner.hooks import Way
from shira.tuner.layer import ShiraLayer


class Embedding(ShiraLayer):
    """SHiRA in a look-up table, its weight stored ``[rows, dim]``."""

    known_forwards = frozenset({nn.Embedding.forward})

    def _stores_input_first(self) -> bool:
        return True  # rows are looked up by the input

    def _way(self, base: Any) -> Way:
        # a gradient that is scaled by frequency is left to torch
        return Way.OWN if base.scale_grad_by_freq else super()._way(base)

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        return ops.embedding(x, base.weight, deltas, indices, padding_idx=base.padding_idx)

    def _grouped_forward(self, x: Tensor, groups: dict[str, list[int]]) -> Tensor | None:
        return grouped_embedding(self, x, groups)
