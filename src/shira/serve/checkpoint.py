# SPDX-License-Identifier: Apache-2.0
"""A few entries of a safetensors checkpoint on disk, to compare with what is served.

An engine may lay weights out anew after loading (packed for its kernels, experts shuffled) in
memory of the same shape and dtype; then a loader's trace points at the wrong places and nothing
but the values can tell. Reads headers and single entries; never a whole tensor.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shira.store.safetensors_header import TensorInfo, header_of

_ON_DISK = {
    "F64": ("<f8", torch.float64),
    "F32": ("<f4", torch.float32),
    "F16": ("<f2", torch.float16),
    "BF16": ("<i2", torch.bfloat16),
}


class Checkpoint:
    """A folder with a safetensors checkpoint in one or more files.

    Args:
        folder: Read when first asked for something.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @cached_property
    def tensors(self) -> dict[str, tuple[Path, TensorInfo]]:
        """Every tensor by name: its file, and what the header says of it."""
        return {
            name: (file, info)
            for file in sorted(self.folder.glob("*.safetensors"))
            for name, info in header_of(file).tensors.items()
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; empty if the folder has no safetensors checkpoint."""
        return {name: info.shape for name, (_, info) in self.tensors.items()}

    def entries(self, name: str, indices: Tensor) -> Tensor | None:
        """The values of a tensor at flat indices, in the checkpoint's dtype.

        Args:
            name: The checkpoint's name of it.
            indices: ``(n,)`` in range, any integer dtype.

        Returns:
            ``(n,)``, or None if it is not there or not kept as floating point.
        """
        if name not in self.tensors or self.tensors[name][1].dtype not in _ON_DISK:
            return None
        file, info = self.tensors[name]
        numpy_dtype, dtype = _ON_DISK[info.dtype]
        numel = int(np.prod(info.shape, dtype=np.int64))
        flat = np.memmap(file, dtype=numpy_dtype, mode="r", offset=info.start, shape=(numel,))
        found = torch.from_numpy(flat[indices.cpu().to(torch.int64).numpy()])
        return found if found.dtype == dtype else found.view(dtype)
