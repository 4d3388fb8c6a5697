# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every class of transformers: its default config with every size made small."""

from __future__ import annotations

import re
from typing import Any

# Lists of one item a layer, and choices of layers: the defaults of a smaller model are taken.
_LAYERWISE = {
    *("layer_types", "per_layer_config", "mlp_layer_types", "indexer_types", "stage_names"),
    *("out_features", "out_indices", "_name_or_path"),
}
_LIMITS = (  # the first that fits
    ("_token_id$", 3),
    ("vocab", 200),
    ("layers$|^depth$|^n_layer$|^num_blocks$", 2),
    ("expert.*(per_tok|top)|(per_tok|top).*expert", 2),
    ("expert(?!.*size)|heads", 4),
    ("^image_size$", 32),
    ("^patch_size$", 16),
    ("max_position", 64),
)


def small(told: dict[str, Any]) -> dict[str, Any]:
    """A config, as a dict, with every size made small."""
    made: dict[str, Any] = {}
    layers = [told.get(name) for name in ("num_hidden_layers", "depth", "num_layers")]
    for name, value in told.items():
        if name in _LAYERWISE or (isinstance(value, (list, tuple)) and len(value) in layers):
            continue
        made[name] = _small(name, value)
    return made


def _small(name: str, value: Any) -> Any:
    if isinstance(value, dict) and "model_type" in value:
        return small(value)
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name == "head_dim":
        return 8
    limits = (limit for pattern, limit in _LIMITS if re.search(pattern, name))
    large = value >= 64 and re.search("size|dim|channels|rank|d_|ffn|width", name)
    return min(value, next(limits, 32 if large else value))


def small_model(name: str, **fields: Any) -> Any:
    """A model of a class of transformers, from a tiny config, its weights random but fixed."""
    import torch
    import transformers

    kind = getattr(transformers, name)
    default = kind.config_class()
    torch.manual_seed(0)
    return kind(type(default).from_dict({**small(default.to_dict()), **fields}))
