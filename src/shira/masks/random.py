# SPDX-License-Identifier: Apache-2.0
"""The `random` mask: k entries of a weight, uniformly, without replacement, in O(k)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shira.errors import MaskError
from shira.masks.budget import check_fits
from shira.masks.permutation import permute, round_keys, sort_points
from shira.support import Support


def random_support(
    shape: Sequence[int], k: int, *, seed: int, name: str = "", slot: int = 0
) -> Support:
    """Choose k entries uniformly at random (paper B.2, SHiRA-Rand).

    Seed and name key a permutation of the weight's entries; the mask is its ``slot``-th run of k
    points. Equal arguments give equal masks on any platform and with any version of torch.

    Args:
        shape: Shape of the weight as stored.
        k: How many entries.
        seed: Any integer.
        name: The parameter's name, so that two weights of equal shape get independent masks.
        slot: Masks of equal shape, k, seed and name in different slots never overlap.

    Returns:
        A support of exactly k entries, on the CPU.

    Raises:
        MaskError: If k entries do not fit the weight, or the slot is beyond the last that fits.
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
