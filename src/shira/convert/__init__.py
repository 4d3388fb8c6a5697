# SPDX-License-Identifier: Apache-2.0
"""Converting: adapters into checkpoints and back, from full fine-tunes and LoRA, to patches."""

from __future__ import annotations

from shira.checkpoints import Checkpoint, Stored, open_checkpoint
from shira.convert.extraction import Change, Extraction, extract
from shira.convert.lora import FromLora, KeptUpdate, from_lora
from shira.convert.lora_file import Factors, is_lora, read_lora
from shira.convert.merging import Merged, MergedDelta, MergedWhole, merge
from shira.convert.patches import (
    SparsePatch,
    Unmerged,
    load_patches,
    save_patches,
    to_patches,
    unmerge,
)

__all__ = [
    "Change",
    "Checkpoint",
    "Extraction",
    "Factors",
    "FromLora",
    "KeptUpdate",
    "Merged",
    "MergedDelta",
    "MergedWhole",
    "SparsePatch",
    "Stored",
    "Unmerged",
    "extract",
    "from_lora",
    "is_lora",
    "load_patches",
    "merge",
    "open_checkpoint",
    "read_lora",
    "save_patches",
    "to_patches",
    "unmerge",
]
