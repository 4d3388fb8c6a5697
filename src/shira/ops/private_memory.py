# SPDX-License-Identifier: Apache-2.0
"""Weights whose memory must not be written, not even for an instant, get memory of their own.

A weight mapped from a file for sharing would carry every scatter through to the file; one mapped
read-only would end the process; one in memory shared with other processes would show them an
adapter. Mappings that copy on write, as ``from_pretrained`` makes them, are left as they are.
"""

from __future__ import annotations

import bisect
from pathlib import Path

import torch
from torch import Tensor, nn


class MemoryMap:
    """The process's mappings, read once (Linux); elsewhere torch's own word is taken."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._flags: list[str] = []
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

    def is_private(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory may be written without anyone else seeing it."""
        if tensor.device.type != "cpu" or tensor.is_meta or not tensor.numel():
            return True
        if not self._starts:
            return not tensor.is_shared()  # type: ignore[no-untyped-call]
        at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() >= self._ends[at]:
            return not tensor.is_shared()  # type: ignore[no-untyped-call]
        flags = self._flags[at]
        return "w" in flags and flags.endswith("p")


def own_memory(layer: nn.Module, memory_map: MemoryMap) -> None:
    """Give the layer's weight a private copy if its memory is shared or read-only."""
    weight = layer.weight
    if isinstance(weight, nn.Parameter) and not memory_map.is_private(weight.data):
        with torch.no_grad():
            weight.data = weight.data.clone()
