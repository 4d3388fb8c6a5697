# SPDX-License-Identifier: Apache-2.0
"""Single entries of a tensor on disk, read and overwritten at sorted flat indices.

Neighbours are read and written together, in windows of at most `WINDOW` bytes, and stretches
without an entry are passed over; memory is one window and the entries. Nothing is mapped into
memory, so the pages of a file never count as the process's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.checkpoints.opening import FLOATS, Stored
from shira.errors import FileFormatError
from shira.store.header import WHOLE_DTYPES

WINDOW = 2**22
"""Bytes that are read at once, at most."""

_GAP = 2**14  # bytes without an entry that are cheaper read along than sought over

# How entries of a number of bytes are handled, as integers: in the file and as a tensor.
_BITS: Mapping[int, tuple[np.dtype[np.signedinteger], torch.dtype]] = {
    1: (np.dtype("i1"), torch.int8),
    2: (np.dtype("<i2"), torch.int16),
    4: (np.dtype("<i4"), torch.int32),
    8: (np.dtype("<i8"), torch.int64),
}


def values_at(stored: Stored, flat: Tensor) -> Tensor | None:
    """Return ``(k,)`` values of a stored tensor at increasing flat indices.

    Returns:
        None if it holds no floating-point numbers that a delta could be added to.
    """
    if stored.dtype not in FLOATS:
        return None
    with open(stored.file, "rb", buffering=0) as file:
        return read_entries(file, stored, flat.cpu())


def read_entries(file: BinaryIO, stored: Stored, flat: Tensor) -> Tensor:
    """Read ``(k,)`` values of a stored tensor.

    Args:
        file: Its file, open for reading without a buffer.
        stored: Of one of the dtypes of `WHOLE_DTYPES`.
        flat: ``(k,)`` increasing flat indices within its shape.

    Raises:
        FileFormatError: If the file has become shorter meanwhile.
    """
    disk, _ = _BITS[WHOLE_DTYPES[stored.dtype].itemsize]
    found = np.empty(flat.numel(), disk)
    where = flat.numpy()
    for low, high in windows(where, disk.itemsize):
        first = int(where[low])
        span = _read(file, stored, first, int(where[high - 1]) + 1 - first, disk)
        found[low:high] = span[where[low:high] - first]
    return torch.from_numpy(found.astype(disk.newbyteorder("="), copy=False)).view(
        WHOLE_DTYPES[stored.dtype]
    )


def write_entries(file: BinaryIO, stored: Stored, flat: Tensor, values: Tensor) -> None:
    """Overwrite entries of a stored tensor.

    Args:
        file: Its file, open for reading and writing without a buffer.
        stored: Of one of the dtypes of `WHOLE_DTYPES`.
        flat: ``(k,)`` increasing flat indices within its shape.
        values: ``(k,)`` in the tensor's dtype.
    """
    disk, bits = _BITS[WHOLE_DTYPES[stored.dtype].itemsize]
    where, new = flat.numpy(), values.view(bits).numpy()
    for low, high in windows(where, disk.itemsize):
        first = int(where[low])
        span = _read(file, stored, first, int(where[high - 1]) + 1 - first, disk)
        span[where[low:high] - first] = new[low:high]
        file.seek(stored.start + first * disk.itemsize)
        rest = span.data.cast("B")
        while rest:
            rest = rest[file.write(rest) :]


def read_span(file: BinaryIO, stored: Stored, first: int, count: int) -> Tensor:
    """``count`` consecutive entries of a stored tensor, from flat index ``first`` on."""
    disk, _ = _BITS[WHOLE_DTYPES[stored.dtype].itemsize]
    span = _read(file, stored, first, count, disk)
    native = span.astype(disk.newbyteorder("="), copy=False)
    return torch.from_numpy(native).view(WHOLE_DTYPES[stored.dtype])


def windows(where: NDArray[np.signedinteger], itemsize: int) -> Iterator[tuple[int, int]]:
    """Runs ``low:high`` of increasing indices that are read together.

    Args:
        where: ``(k,)`` flat indices.
        itemsize: Bytes of an entry.
    """
    if not where.size:
        return
    cuts = np.flatnonzero(np.diff(where) > _GAP // itemsize) + 1
    length = WINDOW // itemsize
    for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), where.size], strict=True):
        while low < high:
            end = int(where[low]) + length
            stop = low + int(np.searchsorted(where[low:high], end))
            yield low, stop
            low = stop


def _read(
    file: BinaryIO, stored: Stored, first: int, count: int, dtype: np.dtype[np.signedinteger]
) -> NDArray[np.signedinteger]:
    span = np.empty(count, dtype)
    file.seek(stored.start + first * dtype.itemsize)
    rest = span.data.cast("B")
    while rest:
        got = file.readinto(rest)  # type: ignore[attr-defined]
        if not got:
            raise FileFormatError(f"{stored.file}: tensor {stored.key!r}: truncated while read")
        rest = rest[got:]
    return span
