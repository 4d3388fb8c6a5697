# SPDX-License-Identifier: Apache-2.0
"""`IndexDict`: the positions of each adapter of a layer, under PEFT's name ``shira_indices``.

Persistent buffers, so that they move, save and load with the layer. Seen from outside, in state
dicts too, they are PEFT's int32 ``(2, k)``, whatever they are cast to: some versions of PEFT cast
every entry of a buffer dictionary to the weight's dtype, in which large indices do not fit. From a
layer's first forward on they are kept `shira.ops.packed`, a byte each, where that can be (not
before: who loads a file into a new model, transformers for one, compares shapes with the buffers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from shira.errors import SupportError
from shira.ops.packed import pack, unpack
from shira.support import Support


def digest_of(support: Support) -> str:
    """Return a hash of positions."""
    raw = support.indices.cpu().contiguous().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


class IndexDict(BufferDict):
    """``{adapter name: int32 (2, k)}``: row and column of each trained entry, sorted.

    Args:
        shape: Of the weight.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(persistent=True)
        self._shape = tuple(shape)
        self._left_out = False

    def __setitem__(self, adapter_name: str, indices: Tensor) -> None:
        if indices.is_floating_point() and not torch.equal(indices, indices.float().round()):
            raise SupportError(f"indices of adapter {adapter_name!r} are not whole numbers")
        super().__setitem__(adapter_name, indices.to(torch.int32))

    def __getitem__(self, adapter_name: str) -> Tensor:
        return unpack(super().__getitem__(adapter_name), self._shape)

    def kept(self, adapter_name: str) -> Tensor:
        """The positions as they are kept: the same tensor at each call, for ops."""
        indices = self._buffers[adapter_name]
        assert indices is not None
        if indices.dtype != torch.uint8 and not torch.compiler.is_compiling():
            indices = self._buffers[adapter_name] = pack(indices, self._shape)
        return indices

    def values(self) -> Iterator[Tensor]:
        """Row and column, adapter by adapter."""
        return (self[name] for name in self)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names with rows and columns."""
        return ((name, self[name]) for name in self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IndexDict:
        # Never to the meta device: who moves a model there, to load or to shard it (Accelerate's
        # cpu_ram_efficient_loading), means to fill its parameters afterwards, not its positions.
        real = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, indices in self._buffers.items():
            assert indices is not None
            if indices.is_meta:
                self._buffers[name] = real[name]
            elif not indices.is_cpu:
                self._buffers[name] = unpack(indices, self._shape)
        return self

    def leave_out(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the positions out of a state dict that is about to be filled and loaded back."""
        for name in self._buffers:
            state_dict.pop(prefix + name, None)
        self._left_out = True

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self:
            destination[prefix + name] = self[name]

    def _load_from_state_dict(self, *args: Any) -> None:
        missing_keys: list[str] = args[4]
        known = len(missing_keys)
        before = dict(self._buffers)
        self._buffers.update(self.items())  # what is loaded is copied into them
        try:
            super()._load_from_state_dict(*args)
            # the tensors as they were if they hold the same: plans go by them
            for name, indices in self._buffers.items():
                old = before[name]
                assert indices is not None
                assert old is not None
                new = indices.to(torch.int32)
                if new.device != old.device or not torch.equal(new, unpack(old, self._shape)):
                    before[name] = new
        finally:
            self._buffers.update(before)
        if self._left_out:
            del missing_keys[known:]
        self._left_out = False
