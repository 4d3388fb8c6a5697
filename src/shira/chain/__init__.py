# SPDX-License-Identifier: Apache-2.0
"""Chains of checkpoints: what changed from each to the next, in one small file, bit for bit.

A link is the difference of two checkpoints: what `diff` writes and `apply` replays, for full
fine-tunes and reinforcement learning, where a step changes about one entry of a hundred. Any dtype,
any change: an adapter is not needed. One file an idea::

    coding    one piece of a tensor as what changed in it
    link      the file: reading, with everything checked, and writing
    files     a checkpoint in pieces, and its hashes
    diffing   a link from two checkpoints
    applying  links on a checkpoint, and where in a chain one stands
    patches   links as patches for engines that take single entries
"""

from __future__ import annotations

from shira.chain.applying import Applied, Verified, apply, verify
from shira.chain.diffing import ChangedTensor, Difference, diff
from shira.chain.patches import to_patches

__all__ = [
    "Applied",
    "ChangedTensor",
    "Difference",
    "Verified",
    "apply",
    "diff",
    "to_patches",
    "verify",
]
