# SPDX-License-Identifier: Apache-2.0
"""Base models as their weights: the one way to find, open, read and rewrite a checkpoint on disk.

Sits above ``store``; imports torch, numpy and safetensors only (transformers on use, where a config
tells of a model of its own). One file an idea::

    boxes       where entries go when a view of a tensor is copied, by offsets and strides
    conversion  where each parameter of a model lies in its checkpoint, as transformers loads it
    opening     which files make up a checkpoint, and where each tensor lies in them
    entries     single entries of a tensor on disk, read, and overwritten in a copy
    locating    the places of an adapter's parameters, by their names
    models      a model's shapes, tensors and entries, on disk or in memory
"""

from __future__ import annotations

from shira.checkpoints.locating import locate, without_tied
from shira.checkpoints.models import Base, OnDisk, shapes_of
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
