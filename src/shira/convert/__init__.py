# SPDX-License-Identifier: Apache-2.0
"""Converting: adapters into checkpoints and back, from full fine-tunes and LoRA, to patches.

Sits above ``masks``, ``store`` and ``checkpoints``; imports torch, numpy and safetensors only. One
file an idea::

    merging, unmerging   an adapter into a checkpoint on disk, and the very bytes back
      rewriting, copying   a copy of a folder with some entries overwritten, whole or not at all
      undo                 what stood there: the undo file
    extraction           the adapter between two models
      exact                the delta that carries one value exactly to another
    from_lora            the largest entries of a LoRA's update
      lora, lora_file      its product by blocks, and PEFT's files of it
    patches              vLLM's sparse weight patches

      budgets              how many entries to keep
"""

from __future__ import annotations

from shira.checkpoints.opening import Checkpoint, Stored, open_checkpoint
from shira.convert.extraction import Change, Extraction, extract
from shira.convert.from_lora import from_lora
from shira.convert.lora import Factors, FromLora, Kept
from shira.convert.lora_file import is_lora, read_lora
from shira.convert.merging import Merged, Target, merge
from shira.convert.patches import SparsePatch, load_patches, save_patches, to_patches
from shira.convert.unmerging import Unmerged, unmerge

__all__ = [
    "Change",
    "Checkpoint",
    "Extraction",
    "Factors",
    "FromLora",
    "Kept",
    "Merged",
    "SparsePatch",
    "Stored",
    "Target",
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
