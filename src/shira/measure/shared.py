# SPDX-License-Identifier: Apache-2.0
"""The entries that two deltas share: one sort of all indices, O(k)."""

from __future__ import annotations

import torch
from torch import Tensor

from shira.support import Support


def shared_entries(a: Support, b: Support) -> tuple[Tensor, Tensor]:
    """Where the shared positions stand in each of two supports of one weight.

    Returns:
        int64 ``(shared,)`` for ``a`` and for ``b``: the same positions in the same order.
    """
    if a is b or a == b:
        everything = torch.arange(a.nnz, device=a.indices.device)
        return everything, everything
    merged, order = torch.sort(torch.cat((a.indices, b.indices)), stable=True)
    # stable: of two equal indices that of a comes first
    at = (merged[1:] == merged[:-1]).nonzero().squeeze(1)
    return order[at], order[at + 1] - a.nnz
