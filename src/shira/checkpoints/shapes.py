# SPDX-License-Identifier: Apache-2.0
"""The shapes of a base model's weights, from whatever of the base is at hand.

A module in memory, a checkpoint on disk of which only headers are read, or a plain mapping.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import nn

from shira.errors import FileFormatError
from shira.store.names import base_module_name, full_shape, unwrapped
from shira.store.safetensors_header import header_of

Base: TypeAlias = "nn.Module | str | os.PathLike[str] | Mapping[str, Sequence[int]]"
"""A base model, a safetensors file or folder of them, or ``{parameter name: shape}``."""


def shapes_of(base: Base, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of a base model's weights by parameter name.

    Args:
        base: An ``nn.Module`` (wrapped or adapted ones count as the base inside), the path of a
            safetensors checkpoint or of a folder with one in one or more files, or the shapes
            themselves.
        names: Parameters that are asked for, if only some are.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If a checkpoint is damaged, or a folder has none.
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
    return _shapes_on_disk(Path(base))


def _shapes_on_disk(path: Path) -> dict[str, tuple[int, ...]]:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileFormatError(f"{path}: the folder has no safetensors checkpoint")
    return {name: info.shape for file in files for name, info in header_of(file).tensors.items()}
