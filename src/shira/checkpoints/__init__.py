# SPDX-License-Identifier: Apache-2.0
"""Base models as their weights: the one way to find, open and read a checkpoint on disk.

Sits above ``store``; imports torch, numpy and safetensors only. One file an idea::

    opening   which files make up a checkpoint, and where each tensor lies in them
    entries   single entries of a tensor on disk, read and overwritten
    naming    an adapter's parameter names in a checkpoint
    shapes    the shapes of a base's weights, from a module, a checkpoint or a mapping
    sources   the tensors of a model, from disk or memory, piece by piece
"""

from __future__ import annotations

from shira.checkpoints.opening import FLOATS, Checkpoint, Stored, open_checkpoint
from shira.checkpoints.shapes import Base, shapes_of

__all__ = ["FLOATS", "Base", "Checkpoint", "Stored", "open_checkpoint", "shapes_of"]
