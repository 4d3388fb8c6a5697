# SPDX-License-Identifier: Apache-2.0
"""The coding of one piece of a tensor as what changed in it; bits in, bits out.

A piece is an array of bytes, taken as unsigned integers of its dtype's width, whatever they stand
for: NaN, -0.0 and infinities are bits like others. It is coded in the shortest of three ways:

- ``b""``: the old piece's bits;
- entries: which ones changed, and new minus old modulo 2^bits, zigzagged (0, -1, 1, -2, ...), so
  that small changes of either sign are small numbers;
- whole: the new piece, without the old one.

An update of a size common to all entries changes those of small magnitude most often and by most
units of their last place. So the entries are put in order by the eight bits below the sign, which
are a bfloat16's or float32's exponent: the lowest eighth of them sorted, then all others in place.
Positions are then gaps that grow slowly, and changes shrink, and what is alike stands together.

Each number's bytes are split into planes, first the least byte of all, and each plane is deflated
(runs and Huffman codes only, in short blocks) unless that makes it longer. ``docs/chain.md`` has
the layout byte by byte.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shira.errors import SupportError
from shira.ops.gaps import UNITS, decode, encode
from shira.store.header import Bits

PIECE = 2**23
"""Bytes of a piece, at most; a multiple of every width."""

LONGEST = 2 * PIECE + 2**12
"""Bytes that a coded piece can have, at most."""

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.unsignedinteger[Any]]

_ENTRIES, _WHOLE = 1, 2
_SHARE = 1 / 8  # of the entries that are sorted
_SAMPLE = 64  # one entry of so many is looked at to find them
_LEVEL, _MEMORY, _STRATEGY = 6, 6, zlib.Z_RLE  # measured: see docs/chain.md


def encode_piece(new: Bytes, old: Bytes | None, width: int) -> bytes:
    """Return a coded piece.

    Args:
        new: Its bytes, a multiple of ``width``.
        old: As many bytes that it can be told from; None if there are none.
        width: Bytes of an entry: 1, 2, 4 or 8.
    """
    coded = None
    if old is not None:
        was, now = _numbers(old, width), _numbers(new, width)
        changed = was != now
        if not changed.any():
            return b""
        coded = _encode_entries(now, was, changed)
        if len(coded) <= new.size // 4:  # as a whole it takes more, or both are short
            return coded
    whole = bytes([_WHOLE]) + _encode_planes(_numbers(new, width))
    return whole if coded is None or len(whole) < len(coded) else coded


def decode_piece(coded: bytes, old: Bytes | None, size: int, width: int) -> Bytes:
    """Return the ``size`` bytes that `encode_piece` was given; ``old`` is not changed.

    Raises:
        ValueError: If that cannot be; nothing larger than a piece was allocated.
    """
    if coded and coded[0] == _WHOLE:
        numbers, end = _decode_planes(coded, 1, size // width, width)
        if end != len(coded):
            raise ValueError("bytes follow the coded piece")
        return numbers.view(np.uint8)
    if old is None:
        raise ValueError("it stands on a tensor, but names none")
    if not coded:
        return old
    if coded[0] != _ENTRIES:
        raise ValueError(f"unknown coding {coded[0]}")
    new: Bytes = old.copy()
    _decode_entries(coded, _numbers(new, width))
    return new


def changed_in(coded: bytes, count: int) -> int:
    """Return how many of its entries a coded piece tells."""
    if coded and coded[0] == _ENTRIES:
        return sum(struct.unpack_from("<BBII", coded)[2:])
    return count if coded else 0


def stands_alone(coded: bytes) -> bool:
    """Return whether a coded piece is read without an old one."""
    return coded[:1] == bytes([_WHOLE])


def changes(new: Bytes, old: Bytes, width: int) -> tuple[Bits, Bits]:
    """Return where two pieces differ, and the new entries there, as signed integers."""
    now = _numbers(new, width)
    where = np.flatnonzero(now != _numbers(old, width))
    return where, now[where].view(f"<i{width}")


def _encode_entries(new: Numbers, old: Numbers, changed: NDArray[np.bool_]) -> bytes:
    classes = _classes(old)
    sample = np.sort(classes[::_SAMPLE])
    bound = int(sample[int(sample.size * _SHARE)])
    low = _sorted_below(classes, bound)
    first = np.flatnonzero(changed[low])
    changed[low] = False
    second = np.flatnonzero(changed)
    where = np.concatenate([low[first], second])
    size = old.itemsize
    signed = f"<i{size}"
    difference = (new[where] - old[where]).view(signed)
    zigzag = ((difference << 1) ^ (difference >> (8 * size - 1))).view(old.dtype)
    parts = [struct.pack("<BBII", _ENTRIES, bound, first.size, second.size)]
    for positions in (first, second):
        units = encode(positions.astype(np.int32))
        parts += [struct.pack("<BI", units.itemsize, units.size), _encode_planes(units)]
    return b"".join([*parts, _encode_planes(zigzag)])


def _decode_entries(coded: bytes, numbers: Numbers) -> None:
    """Change the old numbers, in place, to the new ones."""
    try:
        _, bound, *counts = struct.unpack_from("<BBII", coded)
        at, found = struct.calcsize("<BBII"), []
        classes = _classes(numbers)
        low = _sorted_below(classes, bound)
        for count, among in zip(counts, (low.size, numbers.size), strict=True):
            width, length = struct.unpack_from("<BI", coded, at)
            unit = next((u for u in UNITS.values() if u.itemsize == width), None)
            if unit is None or count > among or length > count + among // np.iinfo(unit).max:
                raise ValueError("more entries are listed than there are")
            units, at = _decode_planes(coded, at + struct.calcsize("<BI"), length, width)
            found.append(decode(units, among, count))
    except (struct.error, SupportError) as error:
        raise ValueError(f"positions cannot be read: {error}") from error
    where = np.concatenate([low[found[0]], found[1]])
    zigzag, at = _decode_planes(coded, at, where.size, numbers.itemsize)
    if at != len(coded):
        raise ValueError("bytes follow the coded piece")
    numbers[where] += (zigzag >> 1) ^ (0 - (zigzag & 1))


def _classes(numbers: Numbers) -> Bytes:
    """Return the eight bits below the highest of each number, seven of a byte."""
    shift = max(8 * numbers.itemsize - 9, 0)
    kept: Bytes = (numbers >> shift).astype(np.uint8) if shift else numbers & np.uint8(0x7F)
    return kept


def _sorted_below(classes: Bytes, bound: int) -> NDArray[np.signedinteger[Any]]:
    """Return where classes are below the bound, in order of class and then of place."""
    low = np.flatnonzero(classes < bound)
    return low[np.argsort(classes[low], kind="stable")]


def _encode_planes(numbers: Numbers) -> bytes:
    parts = []
    for plane in numbers.view(np.uint8).reshape(-1, numbers.itemsize).T:
        raw = plane.tobytes()
        deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, _MEMORY, _STRATEGY)
        short = deflate.compress(raw) + deflate.flush()
        kept = short if len(short) < len(raw) else raw
        parts += [struct.pack("<I", len(kept)), kept]
    return b"".join(parts)


def _decode_planes(coded: bytes, at: int, count: int, width: int) -> tuple[Numbers, int]:
    """Return the numbers whose planes begin at a byte, and the byte after them."""
    planes = np.empty((count, width), np.uint8)
    for plane in planes.T:
        if len(coded) < at + 4:
            raise ValueError("truncated: a plane has no length")
        (length,) = struct.unpack_from("<I", coded, at)
        kept = coded[at + 4 : at + 4 + length]
        at += 4 + length
        if len(kept) < length or length > count:
            raise ValueError("truncated: a plane is longer than what is there")
        if length < count:
            kept = _inflate(kept, count)
        plane[:] = np.frombuffer(kept, np.uint8)
    return planes.reshape(-1).view(f"<u{width}"), at


def _inflate(short: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj(-15)
    try:
        whole = inflate.decompress(short, size + 1)
    except zlib.error as error:
        raise ValueError(f"a plane cannot be inflated: {error}") from error
    if len(whole) != size or not inflate.eof or inflate.unused_data:
        raise ValueError(f"a plane does not inflate to {size} bytes")
    return whole


def _numbers(raw: Bytes, width: int) -> Numbers:
    return raw.view(f"<u{width}")
