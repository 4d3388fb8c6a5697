# SPDX-License-Identifier: Apache-2.0
"""PEFT's own SHiRA, which stays reachable where it is defined."""

from __future__ import annotations

import torch
from peft.tuners.shira.config import ShiraConfig as StockConfig
from peft.tuners.shira.model import ShiraModel as StockModel


def stock_model(model, **options):
    """The base model inside PEFT's own tuner."""
    config = StockConfig(**{key: v for key, v in options.items() if key != "mask_fn"})
    if "mask_fn" in options:
        config.mask_fn = options["mask_fn"]
    return StockModel(model, {"default": config}, "default")


def fixed_mask(base_layer, r, **kwargs):
    """A mask that depends on the shape alone, so that two models get the same."""
    weight = base_layer.weight
    k = r * sum(weight.shape)
    chosen = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(weight.numel()))
    mask = torch.zeros(weight.numel(), dtype=weight.dtype)
    mask[chosen[:k]] = 1
    return mask.view(weight.shape)
