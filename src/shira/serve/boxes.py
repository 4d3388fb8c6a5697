# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic: which position of a storage holds an entry of a checkpoint's weight.

A loader that places a weight copies *views*: a part of the checkpoint's weight, perhaps transposed,
to a part of what a rank keeps, perhaps inside a fused tensor. Two such views of equal shape are a
box: the sizes, and for each side an offset and strides. An entry ``c`` of the box stands at
``source_offset + sum(c * source)`` of the checkpoint's weight and at
``target_offset + sum(c * target)`` of the storage, so strides alone map one to the other::

    checkpoint q_proj [8, 4]            storage of qkv_proj [8, 4] on rank 1 of 2
      rows 4..7   --- copy_ --->          rows 0..3
    sizes (4, 4)   source (4, 1) + 16   target (4, 1) + 0

The bottom of ``shira.serve``; knows neither modules nor engines. Everything costs O(k).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Dim(NamedTuple):
    """One dimension of a box."""

    size: int
    source: int
    """Step in the flat weight of the checkpoint, in entries."""
    target: int
    """Step in the storage, in entries."""


class Box(NamedTuple):
    """A view of the checkpoint's weight and the view of the storage that it is copied to.

    Attributes:
        dims: Steepest source stride first; no dimension of size one.
        source_offset: Where the view begins in the flat weight.
        target_offset: Where it begins in the storage.
    """

    dims: tuple[Dim, ...]
    source_offset: int
    target_offset: int


def boxes_between(source: Tensor, target: Tensor) -> list[Box]:
    """The boxes that a copy between two views fills.

    Args:
        source: View of the checkpoint's weight (which begins its storage); any device, ``meta``
            included.
        target: View of equal shape of what a rank keeps.

    Returns:
        One box; several where the source is expanded (one entry goes to several places); none if
        the views are empty.

    Raises:
        ValueError: If different entries of the source view are one entry of the weight other than
            by expansion (overlapping strides), or those of the target are.
    """
    if not source.numel():
        return []
    dims = [
        Dim(size, step, into)
        for size, step, into in zip(source.shape, source.stride(), target.stride(), strict=True)
        if size > 1
    ]
    if any(dim.target == 0 for dim in dims) or not _apart([(d.size, d.target) for d in dims]):
        raise ValueError(f"the target's strides {target.stride()} overlap for {target.shape}")
    repeated = [dim for dim in dims if dim.source == 0]
    kept = sorted((dim for dim in dims if dim.source), key=lambda dim: -dim.source)
    if not _apart([(d.size, d.source) for d in kept]):
        raise ValueError(f"the source's strides {source.stride()} overlap for {source.shape}")
    merged = _merged(kept)
    begin, into = int(source.storage_offset()), int(target.storage_offset())
    shifts = itertools.product(*(range(0, d.size * d.target, d.target) for d in repeated))
    return [Box(merged, begin, into + sum(shift)) for shift in shifts]


def locate(box: Box, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The indices that lie in a box, and their positions in the storage.

    Args:
        box: From `boxes_between`.
        indices: ``(k,)`` flat indices into the checkpoint's weight, any integer dtype.

    Returns:
        ``entries`` int64 ``(n,)``, which of the indices lie in the box, in their order, and
        ``positions`` int64 ``(n,)``, where each of them stands in the storage.
    """
    rest = indices.to(torch.int64) - box.source_offset
    inside = rest >= 0
    positions = torch.full_like(rest, box.target_offset)
    for size, source, target in box.dims:
        at = torch.div(rest, source, rounding_mode="floor")
        inside &= at < size
        rest -= at * source
        positions += at * target
    inside &= rest == 0
    entries = inside.nonzero().squeeze(1)
    return entries, positions[entries]


def _merged(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Neighbours that run on in both the source and the target, as one: fewer divisions later."""
    merged: list[Dim] = []
    for dim in dims:
        last = merged[-1] if merged else None
        if last and (last.source, last.target) == (dim.source * dim.size, dim.target * dim.size):
            merged[-1] = Dim(last.size * dim.size, dim.source, dim.target)
        else:
            merged.append(dim)
    return tuple(merged)


def _apart(dims: Sequence[tuple[int, int]]) -> bool:
    """Whether each step clears all that lies below it, so that no two entries coincide."""
    reach = 0
    for size, step in sorted(dims, key=lambda dim: dim[1]):
        if step <= reach:
            return False
        reach += (size - 1) * step
    return True
