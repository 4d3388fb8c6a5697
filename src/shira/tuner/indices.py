# SPDX-License-Identifier: Apache-2.0
"""`IndexDict`: the positions of each adapter of a layer, under PEFT's name ``shira_indices``.

Persistent buffers, so that they move, save and load with the layer, and always int32 ``(2, k)``:
some versions of PEFT cast every entry of a buffer dictionary to the weight's dtype, in which large
indices do not fit.
"""

from __future__ import annotations

import torch
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
