# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Embedding``: `Embedding`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shira import ops
from shira.tuner.grouped import grouped_embedding
from shira.tuner.layer import ShiraLayer


class Embedding(ShiraLayer):
    """SHiRA in a look-up table, its weight stored ``[rows, dim]``."""

    def _stores_input_first(self) -> bool:
        return True  # rows are looked up by the input

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        result = ops.embedding(x, base.weight, deltas, indices, padding_idx=base.padding_idx)
        scale: Tensor | None = self._get_embed_scale()  # Gemma's table multiplies what it looks up
        return result if scale is None else result * scale.to(result.dtype)

    def _grouped_forward(self, x: Tensor, groups: dict[str, list[int]]) -> Tensor | None:
        return grouped_embedding(self, x, groups)
