# SPDX-License-Identifier: Apache-2.0
"""Base models as their weights: the one way to find, open, read and rewrite a checkpoint on disk.

Sits above ``store``; imports torch, numpy and safetensors only. One file an idea::

    opening   which files make up a checkpoint, and where each tensor lies in them
    entries   single entries of a tensor on disk, read, and overwritten in a copy
    models    a model's shapes, tensors and entries by an adapter's names, on disk or in memory
"""

from __future__ import annotations

from shira.checkpoints.models import Base, OnDisk, locate, shapes_of, without_tied
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.store.header import FLOATS, Stored

__all__ = [
    "FLOATS",
    "Base",
    "Checkpoint",
    "OnDisk",
    "Stored",
    "locate",
    "open_checkpoint",
    "shapes_of",
    "without_tied",
]
