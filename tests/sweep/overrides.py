# SPDX-License-Identifier: Apache-2.0
"""Settings of some models that the general rule for small sizes does not get right."""

from __future__ import annotations

from typing import Any

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_DETR = {"backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None}

OVERRIDES: dict[str, dict[str, Any]] = {
    "detr": {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage4"]}},
    "table-transformer": {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage4"]}},
    "conditional_detr": {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage4"]}},
    "dab-detr": {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage4"]}},
    "deformable_detr": _DETR,
    "bamba": {"attn_layer_indices": [1]},
    "align": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    "efficientnet": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}
