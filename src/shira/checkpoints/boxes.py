# SPDX-License-Identifier: Apache-2.0
"""Find where entries of a tensor go when a view of it is copied: by offsets and strides alone.

Two views of equal shape, of a source and of a target, are a `Box`: the sizes, and for each side an
offset and strides, which alone map one to the other. The source may be transposed, the target a
part of a fused tensor::

    checkpoint q_proj [8, 4]            storage of qkv_proj [8, 4] on rank 1 of 2
      rows 4..7   --- copy_ --->          rows 0..3
    sizes (4, 4)   source (4, 1) + 16   target (4, 1) + 0

The views are of tensors on the ``meta`` device as a rule, which have strides but no memory.
Locating k entries costs O(k).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Dim = tuple[int, int, int]  # of a box: its size, and the steps of source and target, in entries


class Box(NamedTuple):
    """A view of a source and the view of a target, of one shape, that it is copied to."""

    dims: tuple[Dim, ...]  # steepest source stride first; none of size one
    source_offset: int  # where the view begins in the flat source
    target_offset: int  # where it begins in the target

    @property
    def source_end(self) -> int:
        """The index behind the last entry of the source."""
        return self.source_offset + 1 + sum((size - 1) * step for size, step, _ in self.dims)

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of ``(k,)`` flat indices lie in the box, and where in the target.

        Both are int64 ``(n,)``, in the order of the indices.
        """
        rest = indices.to(torch.int64) - self.source_offset
        inside = rest >= 0
        positions = torch.full_like(rest, self.target_offset)
        for size, source, target in self.dims:
            at = torch.div(rest, source, rounding_mode="floor")
            inside &= at < size
            rest -= at * source
            positions += at * target
        inside &= rest == 0
        entries = inside.nonzero().squeeze(1)
        return entries, positions[entries]


def boxes_between(source: Tensor, target: Tensor) -> list[Box]:
    """Return the boxes that a copy between two views of equal shape fills.

    One box; several where the source is expanded (one entry goes to several places); none if the
    views are empty. The flat source begins with its storage.
    `ValueError` if entries of a view are one in any other way (overlapping strides).
    """
    if not source.numel():
        return []
    steps = zip(source.shape, source.stride(), target.stride(), strict=True)
    dims = sorted((dim for dim in steps if dim[0] > 1), key=lambda dim: -dim[1])
    if _overlap([(n, into) for n, _, into in dims]):
        raise ValueError(f"the target's strides {target.stride()} overlap for {target.shape}")
    kept = [dim for dim in dims if dim[1]]
    if _overlap([(n, step) for n, step, _ in kept]):
        raise ValueError(f"the source's strides {source.stride()} overlap for {source.shape}")
    begin, offset = int(source.storage_offset()), int(target.storage_offset())
    repeated = (range(0, n * into, into) for n, step, into in dims if not step)
    shifts = itertools.product(*repeated)
    return [Box(_merged(kept), begin, offset + sum(shift)) for shift in shifts]


def _merged(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Join neighbours that run on in both the source and the target: fewer divisions later."""
    merged: list[Dim] = []
    for size, step, into in dims:
        if merged and merged[-1][1:] == (step * size, into * size):
            size *= merged.pop()[0]
        merged.append((size, step, into))
    return tuple(merged)


def _overlap(dims: Sequence[tuple[int, int]]) -> bool:
    """Return whether a step fails to clear all that lies below it, so that entries may coincide."""
    reach = 0
    for size, step in sorted(dims, key=lambda dim: dim[1]):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def storage_key(tensor: Tensor) -> int:
    """Return one number for each storage; a wrapper around other tensors has its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
