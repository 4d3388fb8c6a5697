# SPDX-License-Identifier: Apache-2.0
"""`IndexDict`: the positions of each adapter of a layer, under PEFT's name ``shira_indices``.

Persistent buffers, so that they move, save and load with the layer, and always int32 ``(2, k)``:
some versions of PEFT cast every entry of a buffer dictionary to the weight's dtype, in which large
indices do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from packaging.version import Version
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from shira.errors import SupportError


class IndexDict(BufferDict):
    """``{adapter name: int32 (2, k)}``: row and column of each trained entry, sorted."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self._left_out = False

    def __setitem__(self, adapter_name: str, indices: Tensor) -> None:
        if indices.is_floating_point() and not torch.equal(indices, indices.float().round()):
            raise SupportError(f"indices of adapter {adapter_name!r} are not whole numbers")
        super().__setitem__(adapter_name, indices.to(torch.int32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IndexDict:
        # Never to the meta device: who moves a model there, to load or to shard it (Accelerate's
        # cpu_ram_efficient_loading), means to fill its parameters afterwards, not its positions.
        real = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, indices in self._buffers.items():
            if indices is not None and indices.is_meta:
                self._buffers[name] = real[name]
        return self

    def leave_out(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the positions out of a state dict that is about to be filled and loaded back."""
        for name in self._buffers:
            state_dict.pop(prefix + name, None)
        self._left_out = True

    def _load_from_state_dict(self, *args: Any) -> None:
        # PEFT before 0.21 takes the indices out of the state dict and sets them here itself.
        missing_keys: list[str] = args[4]
        known = len(missing_keys)
        super()._load_from_state_dict(*args)
        if self._left_out or Version(peft.__version__) < Version("0.21"):
            del missing_keys[known:]
        self._left_out = False
