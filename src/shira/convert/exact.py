# SPDX-License-Identifier: Apache-2.0
"""The delta that carries one value exactly to another.

``round(base + delta)`` is the tuned value, bit for bit, when ``delta`` lies in a certain interval,
for adding and rounding keep order; and the interval holds ``tuned - base`` as a real number. So if
any float32 delta will do, one of the two float32 neighbours of ``tuned - base`` does, and as a
rule it is the nearest. If the tuned value came from a float32 adapter there is one, since that
adapter's own delta is one. Where there is none (a large weight that became a very small one)
float64 is tried in the same way, and what even that cannot reach is counted.

Zeros count as equal whatever their sign: no sum of a nonzero base and a delta is -0.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shira.base import accumulation_dtype, replacement


def exact_delta(base: Tensor, tuned: Tensor) -> tuple[Tensor, int]:
    """Deltas with ``replacement(base, delta) == tuned``, and how many entries have none.

    Args:
        base: ``(k,)`` finite values in the base's dtype.
        tuned: ``(k,)`` finite values, of that dtype.

    Returns:
        ``(k,)`` in float32 if that is enough for all, else in float64; and the count of entries
        that are not reached (they are met as nearly as float64 can).
    """
    delta, missed = _nearest(base, tuned, accumulation_dtype(base.dtype))
    if missed and delta.dtype == torch.float32:
        return _nearest(base, tuned, torch.float64)
    return delta, missed


def _nearest(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Deltas of one dtype, each the nearest or its neighbour, and the count of those that miss."""
    delta = tuned.to(dtype) - base.to(dtype)
    missed = replacement(base, delta) != tuned
    for direction in (math.inf, -math.inf):
        if not bool(missed.any()):
            return delta, 0
        here = missed.nonzero().squeeze(1)
        near = torch.nextafter(delta[here], torch.tensor(direction, dtype=dtype))
        hits = replacement(base[here], near) == tuned[here]
        delta[here[hits]] = near[hits]
        missed[here[hits]] = False
    return delta, int(missed.sum())
