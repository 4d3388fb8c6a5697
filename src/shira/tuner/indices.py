# SPDX-License-Identifier: Apache-2.0
"""`IndexDict`: the positions of each adapter of a layer, under PEFT's name ``shira_indices``.

Persistent buffers, so that they move, save and load with the layer, and always int32 ``(2, k)``:
some versions of PEFT cast every entry of a buffer dictionary to the weight's dtype, in which large
indices do not fit.
"""

from __future__ import annotations

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

    def __setitem__(self, adapter_name: str, indices: Tensor) -> None:
        if indices.is_floating_point() and not torch.equal(indices, indices.float().round()):
            raise SupportError(f"indices of adapter {adapter_name!r} are not whole numbers")
        super().__setitem__(adapter_name, indices.to(torch.int32))

    def _load_from_state_dict(self, *args: Any) -> None:
        # PEFT before 0.21 takes the indices out of the state dict and sets them here itself.
        missing_keys: list[str] = args[4]
        known = len(missing_keys)
        super()._load_from_state_dict(*args)
        if Version(peft.__version__) < Version("0.21"):
            del missing_keys[known:]
