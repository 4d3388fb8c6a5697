# SPDX-License-Identifier: Apache-2.0
"""The PEFT plugin: importing it makes PEFT use shira's classes for SHiRA.

Above ``masks``, ``ops`` and ``store``; the only part of shira, beside ``serve`` and ``cli``, that
imports PEFT and transformers.
"""

from __future__ import annotations

from peft import PeftModel, get_peft_model

from shira.tuner.config import ShiraConfig
from shira.tuner.indices import check_ranks
from shira.tuner.layer import ShiraLayer
from shira.tuner.masking import calibrate
from shira.tuner.model import ShiraModel
from shira.tuner.register import register

register()

__all__ = [
    "PeftModel",
    "ShiraConfig",
    "ShiraLayer",
    "ShiraModel",
    "calibrate",
    "check_ranks",
    "get_peft_model",
]
