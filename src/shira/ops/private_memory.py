# SPDX-License-Identifier: Apache-2.0
"""Weights whose memory must not be written, not even for an instant, get memory of their own.

A weight mapped from a file for sharing would carry every scatter through to the file; one mapped
read-only would end the process; one in memory shared with other processes would show them an
adapter. Mappings that copy on write, as ``from_pretrained`` makes them, are left as they are.

Memory can become shared (``share_memory_()``), and other memory be put into a parameter, at any
time, so every write checks it: for what torch has allocated that takes next to nothing.
"""

from __future__ import annotations

import bisect
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from shira.errors import TargetError

_CHECKED = "_shira_private_at"
"""On a storage that torch did not allocate: its address when it was last found to be private."""


class MemoryMap:
    """The process's mappings, read once, when first needed (Linux); elsewhere torch's own word."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._flags: list[str] = []
        self._read = False

    def is_private(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory can be written without anyone else seeing it."""
        if tensor.device.type != "cpu" or tensor.is_meta:
            return True
        storage = tensor.untyped_storage()
        if storage.resizable() and not storage.is_shared():
            return True  # torch's own allocator has made it, and nobody has moved it
        # By the storage: an address may be mapped anew, otherwise. Its attributes live as long.
        if getattr(storage, _CHECKED, None) == storage.data_ptr():
            return True
        private = not storage.nbytes() or self._maps_private(tensor)
        if private:
            setattr(storage, _CHECKED, storage.data_ptr())
        return private

    def _maps_private(self, tensor: Tensor) -> bool:
        self._read_maps()
        at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() >= self._ends[at]:
            return not tensor.untyped_storage().is_shared()
        flags = self._flags[at]
        return "w" in flags and flags.endswith("p")

    def _read_maps(self) -> None:
        if self._read:
            return
        self._read = True
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            span, flags = line.split(maxsplit=2)[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            self._starts.append(start)
            self._ends.append(end)
            self._flags.append(flags)


class SharedMemoryError(TargetError):
    """Memory that is read-only or shared was to be written to; nothing was."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(
            f"a weight of shape {tuple(weight.shape)} lies in memory that is read-only or shared "
            "with other processes, where an adapter must not be written; put a copy in its place"
        )


def check_private(tensor: Tensor) -> None:
    """Refuse memory that is read-only or shared.

    Raises:
        SharedMemoryError: If it is.
    """
    if not MemoryMap().is_private(tensor):
        raise SharedMemoryError(tensor)


def own_memory(layer: nn.Module, memory_map: MemoryMap) -> None:
    """Give the layer's weight a private copy if its memory is shared or read-only."""
    weight = layer.weight
    if isinstance(weight, nn.Parameter) and not memory_map.is_private(weight.data):
        with torch.no_grad():
            weight.data = weight.data.clone()


def make_private(weight: Tensor) -> None:
    """Give a parameter in shared or read-only memory a private copy, with a warning.

    Its values and its identity stay the same.

    Raises:
        SharedMemoryError: If another tensor lies in such memory: it is the caller's, and not moved.
    """
    if MemoryMap().is_private(weight.data):
        return
    if not isinstance(weight, nn.Parameter):
        raise SharedMemoryError(weight)
    with torch.no_grad():
        weight.data = weight.data.clone()
    warnings.warn(
        f"a weight of shape {tuple(weight.shape)} was moved to memory that is read-only or shared "
        "with other processes, where an adapter must not be written; it has memory of its own now",
        stacklevel=3,
    )
