# SPDX-License-Identifier: Apache-2.0
"""Adapted ``nn.Embedding``: `Embedding`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shira import ops
from shira.support import Support
from shira.tuner.config import ShiraConfig
from shira.tuner.layer import ShiraLayer


class Embedding(ShiraLayer, nn.Module):  # type: ignore[misc]
    """SHiRA in a look-up table, its weight stored ``[rows, dim]``."""

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
        self.in_features, self.out_features = self.out_features, self.in_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, support, r, config=config)

    def _product(self, x: Tensor, deltas: list[Tensor], indices: list[Tensor]) -> Tensor:
        base: Any = self.get_base_layer()
        result = ops.embedding(x, base.weight, deltas, indices, padding_idx=base.padding_idx)
        scale: Tensor | None = self._get_embed_scale()  # Gemma's table multiplies what it looks up
        return result if scale is None else result * scale.to(result.dtype)
