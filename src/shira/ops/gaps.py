# SPDX-License-Identifier: Apache-2.0
"""Sorted indices as the gaps between them, mostly in one byte each.

The gap before an index is the number of entries left out since the one before it. A code unit of
one, two or four bytes holds a gap up to its largest value, which itself means "that many left out,
and the gap goes on"::

    indices     3    4    300        301
    gaps        3    0    295        0
    one byte    3    0    255 40     0

So any units whose last is no largest value are the indices of exactly one set, in order and without
repeats; what is left to check is how many there are and that the last is in range. At 2 % density
an index takes 1.006 bytes. ``docs/file-format.md`` is the specification.

Both directions cost O(number of units): in the compiled kernels, or without them in numpy. Compact
files hold gaps (``store``), and so do layers on the CPU: PEFT's ``shira_indices`` are int32 rows
and columns, 8 bytes a position; `pack` makes a byte of them where that can be. Wherever ops take
indices they take either form, and the compiled kernels walk along the gaps as they are, from
`marks` on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from shira.errors import SupportError
from shira.ops import native
from shira.support import Support, index_dtype

UNITS: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}
"""The code units by safetensors' names, narrowest first."""

BLOCK = 2048
"""Units from one mark to the next."""

LEAST_DENSITY = 1 / 200
"""Below this positions are not packed. At it they take 1.4 bytes each, 1.8 at the worst."""

_PIECE = 2**16  # units that numpy decodes at a time

Ints = NDArray[np.signedinteger[Any]]
Units = NDArray[np.unsignedinteger[Any]]


def encode(indices: Ints, widest: str = "U32") -> Units:
    """Return the gaps of increasing indices, in the unit that takes the fewest bytes.

    That is one of `UNITS`, as wide as ``widest`` at most.
    """
    if (kernels := _kernels()) is not None:
        indices = np.ascontiguousarray(indices)
        coded = kernels.encode_gaps(torch.from_numpy(indices), UNITS[widest].itemsize)
        return coded.numpy()  # type: ignore[no-any-return]
    gaps = np.diff(indices.astype(np.int64), prepend=-1) - 1
    allowed = [dtype for dtype in UNITS.values() if dtype.itemsize <= UNITS[widest].itemsize]
    escapes = {dtype: gaps // _largest(dtype) for dtype in allowed}
    dtype = min(allowed, key=lambda unit: (len(gaps) + escapes[unit].sum()) * unit.itemsize)
    ends = np.cumsum(escapes[dtype] + 1) - 1
    units: Units = np.full(int(ends[-1]) + 1 if len(ends) else 0, _largest(dtype), dtype)
    units[ends] = gaps - escapes[dtype] * _largest(dtype)
    return units


def decode(units: Units, numel: int, count: int | None = None) -> Ints:
    """Return the indices that `encode` was given, int32 where ``numel`` allows, else int64.

    Every index is below ``numel``; there are ``count``, if that is known.

    Raises:
        SupportError: If an index is out of range, the units end within a gap or are those of more
            or fewer indices; nothing of the size of what they claim was allocated.
    """
    kernels = _kernels()
    units = np.ascontiguousarray(units)  # C walks along their memory
    if kernels is not None and units.itemsize <= 2:
        found = count_of(units) if count is None else count
        if found <= len(units):
            indices: Ints = np.empty(found, index_type(numel))
            if kernels.decode_gaps(torch.from_numpy(units), numel, torch.from_numpy(indices)):
                return indices
            del indices
    return _decode_in_numpy(units, numel, count)  # or it says what is wrong


def count_of(units: Units) -> int:
    """Count the indices that the units stand for.

    Raises:
        SupportError: If they end within a gap.
    """
    largest = _largest(units.dtype)
    if len(units) and units[-1] == largest:
        raise SupportError("truncated: the last gap does not end")
    pieces = range(0, len(units), 2**20)
    return sum(int(np.count_nonzero(units[at : at + 2**20] != largest)) for at in pieces)


def marks(units: Units) -> NDArray[np.int64]:
    """Return ``(blocks + 1, 2)``: from where on each block of units can be read by itself.

    That is how many indices the blocks before stand for, and the first index that this one could
    hold; the last row is that of the end.
    """
    starts = np.arange(0, len(units), BLOCK)
    found = np.zeros((len(starts) + 1, 2), np.int64)
    if len(units):
        ends = np.add.reduceat(units != _largest(units.dtype), starts, dtype=np.int64)
        found[1:, 0] = ends.cumsum()
        found[1:, 1] = (np.add.reduceat(units, starts, dtype=np.int64) + ends).cumsum()
    return found


def is_packed(indices: Tensor) -> bool:
    """Return whether positions are gaps in units that the kernels walk, not ``(2, k)``."""
    return indices.dtype in (torch.uint8, torch.uint16) and indices.dim() == 1


def pack(coordinates: Tensor, shape: Sequence[int]) -> Tensor:
    """Return positions as they are best kept: uint8 ``(n,)``, the gaps, if that can be.

    They stay what they are if packed already, not on the CPU, below `LEAST_DENSITY`, or unsorted.
    """
    if is_packed(coordinates) or not coordinates.is_cpu or native.load().library is None:
        return coordinates
    if coordinates.shape[-1] <= LEAST_DENSITY * math.prod(shape):
        return coordinates
    try:
        support = Support.from_coordinates(shape, coordinates)
    except SupportError:  # a placeholder; whoever uses it says what is wrong
        return coordinates
    # Made in a first forward without gradients, used in others. Elsewhere no mode of torch's is
    # entered: see `shira.ops.patch.Exchange.put_in`.
    inference = torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inference else nullcontext():
        return torch.from_numpy(encode(support.indices.numpy(), widest="U8"))


def unpack(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`: return int32 ``(2, k)``, on the device of ``indices``."""
    return support_of(indices, shape).coordinates() if is_packed(indices) else indices


def support_of(indices: Tensor, shape: Sequence[int]) -> Support:
    """Return the positions as a support.

    Raises:
        SupportError: If they are out of range, unsorted or repeated.
    """
    if not is_packed(indices):
        return Support.from_coordinates(shape, indices)
    with temporarily_clear_interpreter_stack():  # or torch.func would hide the numbers
        flat = decode(indices.detach().cpu().numpy(), math.prod(shape))
    return Support._trusted(shape, torch.from_numpy(flat).to(indices.device))


def gaps_of(support: Support, packed: Tensor | None = None) -> native.Gaps:
    """Return a support on the CPU as the compiled kernels take it; ``packed`` is it, packed."""
    if packed is None:
        packed = torch.from_numpy(encode(support.indices.numpy(), widest="U16"))
    packed = packed.contiguous()  # C walks along their memory
    return native.Gaps(packed, torch.from_numpy(marks(packed.numpy())), support.nnz)


def _kernels() -> native.Kernels | None:
    return native.load().library if sys.byteorder == "little" else None


def index_type(numel: int) -> type[np.signedinteger[Any]]:
    """Return numpy's `shira.support.index_dtype`."""
    return np.int64 if index_dtype(numel) == torch.int64 else np.int32


def _decode_in_numpy(units: Units, numel: int, count: int | None) -> Ints:
    found = count_of(units)
    if count not in (None, found):
        raise SupportError(f"stands for {found} entries, but there are {count} values")
    indices: Ints = np.empty(found, index_type(numel))
    done = left_out = 0
    for at in range(0, len(units), _PIECE):  # a file may be all gaps, and these are eight times it
        piece = units[at : at + _PIECE]
        sums = np.cumsum(piece, dtype=np.int64)
        part = sums[piece != _largest(units.dtype)]
        part += left_out + np.arange(done, done + len(part))
        if len(part) and part[-1] >= numel:
            raise SupportError(f"index {part[-1]} is out of range: the weight has {numel} entries")
        indices[done : done + len(part)] = part
        done, left_out = done + len(part), left_out + int(sums[-1])
    return indices


def _largest(dtype: np.dtype[Any]) -> int:
    return int(np.iinfo(dtype).max)
