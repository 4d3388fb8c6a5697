# SPDX-License-Identifier: Apache-2.0
"""The `random` mask: k entries of a weight, uniformly, without replacement, in O(k).

A keyed permutation of ``[0, numel)``, evaluated at just the points one asks for, chooses k entries
without ever listing the others::

    point -> (left, right)                      on a grid of a rows and b columns, a*b >= numel,
             left  += F(right, key 0)  mod a    a ~ b ~ sqrt(numel): at most a points too many
             right += F(left,  key 1)  mod b
             ...                                eight rounds: an alternating Feistel network
          -> left * b + right                   beyond numel? once more ("cycle walking")

Each round can be undone, so the whole is a bijection of the grid; walking on until the image falls
below ``numel`` makes it one of ``[0, numel)``. Integers alone are used, in 64-bit wrap-around
arithmetic: the result depends on neither the platform nor the version of any library. It is not
for secrets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shira.errors import MaskError
from shira.masks.budget import check_fits
from shira.ops import native
from shira.support import Support

ROUNDS = 8
_CHUNK = 2**15  # points at a time: all buffers stay in the cache
_LIMIT = 2**62
_DENSE = 256  # entries of the weight a point: above it marking each of them costs more than sorting
_U32 = np.uint64(32)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 over the golden ratio
_FINISHER = np.uint64(0xD1342543DE82EF95)  # odd, without visible pattern in its bits


def random_support(
    shape: Sequence[int], k: int, *, seed: int, name: str = "", slot: int = 0
) -> Support:
    """Choose k entries uniformly at random (paper B.2, SHiRA-Rand).

    Seed and name key a permutation of the weight's entries; the mask is its ``slot``-th run of k
    points. Equal arguments give equal masks on any platform and with any version of torch.

    Args:
        shape: Shape of the weight as stored.
        k: The number of entries.
        seed: Any integer.
        name: The parameter's name, so that two weights of equal shape get independent masks.
        slot: Masks of equal shape, k, seed and name in different slots never overlap.

    Returns:
        A support of exactly k entries, on the CPU.

    Raises:
        MaskError: If k entries do not fit the weight, or the slot is beyond the last that fits.

    Example:
        >>> a, b = (shira.masks.random_support((64, 64), 100, seed=0, slot=i) for i in (0, 1))
        >>> a.nnz, a.overlap(b)
        (100, 0)
    """
    numel = check_fits(shape, k)
    if slot < 0:
        raise MaskError(f"slots count from 0, so there is no slot {slot}")
    if (slot + 1) * k > numel:
        fit = numel // k
        raise MaskError(
            f"slot {slot} of {k} entries is outside a weight of shape {tuple(shape)}, whose "
            f"{numel} entries have room for {fit} disjoint slots, 0 to {fit - 1}; "
            "train fewer entries to have more slots"
        )
    indices = permute(slot * k, k, numel, round_keys(seed, name))
    sort_points(indices, numel)
    return Support._trusted(shape, torch.from_numpy(indices))


def round_keys(seed: int, name: str) -> NDArray[np.uint64]:
    r"""Return the keys of the rounds: blake2b of ``"<seed>\0<name>"``, little-endian words."""
    text = f"{int(seed)}\0{name}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8 * ROUNDS, person=b"shira.random").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(
    start: int, count: int, numel: int, keys: NDArray[np.uint64]
) -> NDArray[np.signedinteger]:
    """Return the images of the points ``start, ..., start + count - 1`` under the permutation.

    They are distinct integers in ``[0, numel)``, int32 where they fit, else int64. O(count).
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
    if kernels is None:
        return permute_in_numpy(start, count, numel, (a, b), keys)
    words = torch.from_numpy(keys.view(np.int64).copy())
    return kernels.permute(start, count, numel, (a, b), words).numpy()  # type: ignore[no-any-return]


def permute_in_numpy(
    start: int, count: int, numel: int, grid: tuple[int, int], keys: NDArray[np.uint64]
) -> NDArray[np.signedinteger]:
    """Permute without the compiled kernels: their reference, and their replacement."""
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
    """Apply the network once to points of the a x b grid; a bijection of the grid."""
    left, right = np.divmod(points, np.uint64(b))
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = _add_hash(left, right, key, np.uint64(a))
        else:
            right = _add_hash(right, left, key, np.uint64(b))
    image: NDArray[np.uint64] = left * np.uint64(b) + right
    return image


def _add_hash(
    half: NDArray[np.uint64], other: NDArray[np.uint64], key: np.uint64, size: np.uint64
) -> NDArray[np.uint64]:
    """Return ``(half + F(other, key)) mod size``; ``F`` is 32 bits scaled to ``size``."""
    mixed = (other + key) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> _U32)) * _FINISHER
    mixed = ((mixed >> _U32) * size) >> _U32
    total = half + mixed
    # Both terms were below size. Where their sum is too, sum - size wraps to a huge number.
    wrapped: NDArray[np.uint64] = np.minimum(total, total - size)
    return wrapped
