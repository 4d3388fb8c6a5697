# SPDX-License-Identifier: Apache-2.0
"""Several supports of one weight, brought together: their union, and where each stands in it.

Everything else in this part works on the union, so this is the one place that sorts::

    a   2 5     9         union  2 5 7 9
    b     5 7             place of a  0 1 3,  of b  1 2

One sort of all indices together: O(total k) memory, O(total k log) time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shira.support import Support


class Aligned(NamedTuple):
    """Supports of one weight on their union."""

    union: Support
    places: tuple[Tensor | None, ...]
    """int64 ``(k_i,)`` for each: where its entries stand in the union; None: they are the union."""


def align(supports: Sequence[Support]) -> Aligned:
    """The union of some supports, and the place of each one's entries in it.

    Args:
        supports: At least one, of one shape, on one device.
    """
    first, *others = supports
    if all(other is first or other == first for other in others):
        return Aligned(first, (None,) * len(supports))
    merged, order = torch.sort(torch.cat([support.indices for support in supports]), stable=True)
    union, place = torch.unique_consecutive(merged, return_inverse=True)
    places = torch.empty_like(place)
    places[order] = place
    return Aligned(
        Support._trusted(first.shape, union),
        tuple(torch.split(places, [support.nnz for support in supports])),
    )
