# SPDX-License-Identifier: Apache-2.0
"""Configurations made with PEFT's own ``ShiraConfig`` before shira was imported, taken as ours."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.shira.config import ShiraConfig as StockConfig
from peft.tuners.shira.mask_functions import random_mask

from shira.tuner.config import ShiraConfig


def as_ours(config: Any) -> ShiraConfig:
    """The configuration itself if it is ours, else one of ours that says the same.

    Args:
        config: A `ShiraConfig`, or a stock one with its ``mask_fn``.
    """
    if isinstance(config, ShiraConfig) or not isinstance(config, StockConfig):
        return config  # type: ignore[no-any-return]
    known = {field.name for field in dataclasses.fields(ShiraConfig)}
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in known and field.init
    }
    inference_mode = values.pop("inference_mode", False)
    ours = ShiraConfig(**values, inference_mode=True)  # no second warning of an own mask
    ours.inference_mode = inference_mode
    if config.mask_fn is not None and config.mask_fn is not random_mask:
        ours.mask_fn = config.mask_fn
    return ours
