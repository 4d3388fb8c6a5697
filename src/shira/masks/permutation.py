# SPDX-License-Identifier: Apache-2.0
"""A keyed permutation of ``[0, numel)``, evaluated at just the points one asks for.

What `random` needs to choose k entries of a weight without ever listing the others::

    point -> (left, right)                      on a grid of a rows and b columns, a*b >= numel,
             left  += F(right, key 0)  mod a    a ~ b ~ sqrt(numel): at most a points too many
             right += F(left,  key 1)  mod b
             ...                                eight rounds: an alternating Feistel network
          -> left * b + right                   beyond numel? once more ("cycle walking")

Each round can be undone, so the whole is a bijection of the grid; walking on until the image falls
below ``numel`` makes it one of ``[0, numel)``. Integers alone are used, in 64-bit wrap-around
arithmetic: the result depends on neither the platform nor the version of any library. Not meant
for secrets.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray

from shira.errors import MaskError
from shira.ops import native

ROUNDS = 8
_CHUNK = 2**15  # points at a time: all buffers stay in the cache
_LIMIT = 2**62
_DENSE = 256  # entries of the weight a point: above it marking each of them costs more than sorting
_U32 = np.uint64(32)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 over the golden ratio
_FINISHER = np.uint64(0xD1342543DE82EF95)  # odd, without visible pattern in its bits


def round_keys(seed: int, name: str) -> NDArray[np.uint64]:
    r"""The keys of the rounds, from a seed and a name.

    Args:
        seed: Any integer.
        name: Any text, e.g. a parameter name.

    Returns:
        uint64 ``(ROUNDS,)``: blake2b of ``"<seed>\0<name>"``, read as little-endian words.
    """
    text = f"{int(seed)}\0{name}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8 * ROUNDS, person=b"shira.random").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(
    start: int, count: int, numel: int, keys: NDArray[np.uint64]
) -> NDArray[np.signedinteger]:
    """The images of the points ``start, ..., start + count - 1`` under the permutation.

    Costs O(count) time and memory, whatever ``numel``.

    Args:
        start: First point.
        count: How many points; ``start + count <= numel``.
        numel: Size of the domain, below 2^62.
        keys: From `round_keys`.

    Returns:
        ``(count,)`` distinct integers in ``[0, numel)``, int32 where they fit, else int64.

    Raises:
        MaskError: If the points are not in the domain, or the domain is too large.
    """
    if numel > _LIMIT:
        raise MaskError(f"random masks are for weights of up to 2^62 entries, not {numel}")
    if start < 0 or count < 0 or start + count > numel:
        raise MaskError(f"points {start} to {start + count - 1} are not all in [0, {numel})")
    if not count:
        return np.empty(0, dtype=np.int32 if numel <= 2**31 else np.int64)
    a = math.isqrt(numel - 1) + 1
    b = -(-numel // a)
    kernels = native.load().library
    if kernels is not None:
        words = torch.from_numpy(keys.view(np.int64).copy())
        images: NDArray[np.signedinteger] = kernels.permute(
            start, count, numel, (a, b), words
        ).numpy()
        return images
    return permute_in_numpy(start, count, numel, (a, b), keys)


def permute_in_numpy(
    start: int, count: int, numel: int, grid: tuple[int, int], keys: NDArray[np.uint64]
) -> NDArray[np.signedinteger]:
    """`permute` without the compiled kernels: their reference, and their replacement."""
    a, b = grid
    images = np.empty(count, dtype=np.int32 if numel <= 2**31 else np.int64)
    for low in range(0, count, _CHUNK):
        high = min(low + _CHUNK, count)
        points = np.arange(start + low, start + high, dtype=np.uint64)
        points = _shuffle(points, a, b, keys)
        while (outside := np.flatnonzero(points >= np.uint64(numel))).size:
            points[outside] = _shuffle(points[outside], a, b, keys)
        images[low:high] = points
    return images


def sort_points(points: NDArray[np.signedinteger], numel: int) -> None:
    """Sort, in place, distinct points of ``[0, numel)``, which one then has in O(k)."""
    kernels = native.load().library
    if kernels is not None and points.dtype == np.int32 and numel <= _DENSE * points.size:
        kernels.ascending(torch.from_numpy(points), numel)
    else:
        points.sort()


def _shuffle(
    points: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """One pass of the network over points of the a x b grid; a bijection of the grid."""
    width = np.uint64(b)
    left: NDArray[np.uint64] = points // width
    right = points - left * width
    scratch = np.empty_like(points)
    for i, key in enumerate(keys):
        if i % 2 == 0:
            _add_hash(left, right, key, np.uint64(a), scratch)
        else:
            _add_hash(right, left, key, width, scratch)
    left *= width
    left += right
    return left


def _add_hash(
    half: NDArray[np.uint64],
    other: NDArray[np.uint64],
    key: np.uint64,
    size: np.uint64,
    scratch: NDArray[np.uint64],
) -> None:
    """``half = (half + F(other, key)) mod size``, in place; ``F`` is 32 bits scaled to ``size``."""
    mixed = np.add(other, key)
    mixed *= _MULTIPLIER
    np.right_shift(mixed, _U32, out=scratch)
    mixed ^= scratch
    mixed *= _FINISHER
    mixed >>= _U32  # the upper 32 bits, as a fraction of 2^32 ...
    mixed *= size
    mixed >>= _U32  # ... of size
    half += mixed
    # Both terms were below size. Where their sum is too, sum - size wraps to a huge number.
    np.subtract(half, size, out=scratch)
    np.minimum(half, scratch, out=half)
