# SPDX-License-Identifier: Apache-2.0
"""Entries of value 0 for an adapter whose weights have to have r * (m + n) entries each.

PEFT's own SHiRA loads nothing else: it makes room for r * (m + n) values in each weight before it
reads a file. The union of several supports has another number.
"""

from __future__ import annotations

import torch

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.support import Support, matrix_shape


def fill_to_rank(adapter: Adapter) -> tuple[int, Adapter]:
    """The least r with room for every delta, and the adapter filled up to it with zeros.

    Where a weight is too small for r * (m + n) entries, all deltas stay as they are, and r is the
    largest that fits; PEFT's own SHiRA cannot load such an adapter.

    Args:
        adapter: Of any number of entries in each weight.

    Returns:
        r, and the adapter; its metadata are the same but for ``r``.
    """
    sides = {name: sum(matrix_shape(d.support.shape)) for name, d in adapter.items()}
    sides = {name: side for name, side in sides.items() if side}
    r = max([1, *(-(-adapter[name].nnz // side) for name, side in sides.items())])
    if all(r * side <= adapter[name].support.numel for name, side in sides.items()):
        filled = {
            name: _filled_up(delta, r * sides.get(name, 0)) for name, delta in adapter.items()
        }
        return r, Adapter(filled, {**adapter.metadata, "r": r}, adapter.tensors)
    most = min(adapter[name].support.numel // side for name, side in sides.items())
    return max(1, min(r, most)), adapter


def _filled_up(delta: SparseDelta, k: int) -> SparseDelta:
    """The delta with zeros at its first free positions, so that it has k entries."""
    missing = k - delta.nnz
    if missing <= 0:
        return delta
    indices = delta.support.indices
    taken = torch.zeros(k, dtype=torch.bool, device=indices.device)
    taken[indices[indices < k].long()] = True  # of the first k positions, so many are free at least
    free = (~taken).nonzero().squeeze(1)[:missing]
    merged, order = torch.cat((indices.long(), free)).sort()
    values = torch.cat((delta.values, delta.values.new_zeros(missing)))
    return SparseDelta(Support._trusted(delta.support.shape, merged), values[order])
