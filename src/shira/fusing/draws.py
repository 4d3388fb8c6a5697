# SPDX-License-Identifier: Apache-2.0
"""Random draws that belong to a delta, not to its place in a list, and to no global generator.

DARE and DELLA drop entries at random. The draw is keyed by the seed, the parameter's name and the
delta itself (a hash of its positions and values), so that fusing ``[a, b]`` and ``[b, a]`` drops
the same entries, and two adapters drop independently. The hash also gives deltas an order of their
own, in which sums are made whatever order they were given in.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from shira.delta import SparseDelta


def digest(delta: SparseDelta) -> bytes:
    """A hash of a delta's shape, positions, dtype and values, the same on every device."""
    made = hashlib.blake2b(f"{delta.support.shape} {delta.values.dtype}".encode(), digest_size=16)
    for tensor in (delta.support.indices, delta.values):
        made.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return made.digest()


def uniform(count: int, seed: int, name: str, delta: bytes, occurrence: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) for the entries of a delta.

    Args:
        count: How many (k).
        seed: Any integer.
        name: The parameter.
        delta: From `digest`.
        occurrence: Tells deltas apart that are equal in every bit.

    Returns:
        float64 ``(count,)`` on the CPU; the same on every platform and with every version of numpy.
    """
    text = f"{int(seed)}\0{occurrence}\0{name}\0".encode("utf-8", "surrogatepass") + delta
    key = hashlib.blake2b(text, digest_size=16, person=b"shira.fuse").digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
