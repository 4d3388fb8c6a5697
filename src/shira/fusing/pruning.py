# SPDX-License-Identifier: Apache-2.0
"""The entries of largest magnitude of a whole adapter, over all parameters together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shira.delta import SparseDelta
from shira.fusing.sparsify import magnitude
from shira.masks.topk import top_k
from shira.support import Support


def keep_largest(deltas: Mapping[str, SparseDelta], k: int) -> dict[str, SparseDelta]:
    """The k entries of largest magnitude; values keep their bits, parameters their place.

    Of equal magnitudes the first are kept, parameters counted in the order of their names, so that
    the order in which they come does not matter. A parameter may end with no entry.

    Args:
        deltas: By parameter name, on one device.
        k: How many entries to keep in all.
    """
    total = sum(delta.nnz for delta in deltas.values())
    if k >= total:
        return dict(deltas)
    ordered = sorted(deltas)
    if k:
        kept = top_k((magnitude(deltas[name]) for name in ordered), k)
    else:
        kept = torch.zeros(0, dtype=torch.int64)
    result, start = {}, 0
    for name in ordered:
        delta = deltas[name]
        low, high = torch.searchsorted(kept, torch.tensor([start, start + delta.nnz]).to(kept))
        entries = kept[int(low) : int(high)].to(delta.values.device) - start
        support = Support._trusted(delta.support.shape, delta.support.indices[entries])
        result[name] = SparseDelta(support, delta.values[entries])
        start += delta.nnz
    return {name: result[name] for name in deltas}
