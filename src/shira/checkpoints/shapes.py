# SPDX-License-Identifier: Apache-2.0
"""The shapes of a base model's weights, from whatever of the base is at hand.

A module in memory, a checkpoint on disk of which only headers are read, or a plain mapping.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from shira.checkpoints.naming import locate
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.store.names import base_module_name, full_shape, unwrapped

Base: TypeAlias = "nn.Module | str | os.PathLike[str] | Checkpoint | Mapping[str, Sequence[int]]"
"""A base model, its checkpoint as `open_checkpoint` takes it, or ``{parameter name: shape}``."""


def shapes_of(base: Base, names: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a base model's weights by parameter name.

    Args:
        base: An ``nn.Module`` (wrapped or adapted ones count as the base inside), the path or hub
            name of a safetensors checkpoint, an open one, or the shapes themselves.
        names: An adapter's parameter names, which a checkpoint may hold with another prefix. The
            result has these, or all that there are if it is None; of a module or a mapping always
            all.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If there is no safetensors checkpoint, or it is damaged.
        WrongBaseError: If a checkpoint lacks one of the names.
    """
    if isinstance(base, nn.Module):
        root = unwrapped(base)
        tensors = (
            *root.named_buffers(remove_duplicate=False),
            *root.named_parameters(remove_duplicate=False),
        )
        # PEFT keeps a module that an adapter trains whole as its original_module.
        return {
            base_module_name(name).replace(".original_module.", "."): full_shape(tensor)
            for name, tensor in tensors
        }
    if isinstance(base, Mapping):
        return {name: tuple(int(size) for size in shape) for name, shape in base.items()}
    checkpoint = open_checkpoint(base)
    stored = checkpoint.tensors if names is None else locate(names, checkpoint)[0]
    return {name: tensor.shape for name, tensor in stored.items()}
