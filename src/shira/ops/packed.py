# SPDX-License-Identifier: Apache-2.0
"""Positions in about a byte each, as layers on the CPU keep them: `pack` and `unpack`.

PEFT's ``shira_indices`` are int32 rows and columns, 8 bytes a position; a random set of 2 % cannot
be had for less than 0.9. The gaps between sorted positions (`shira.ops.gaps`) take 1.01, and the
compiled kernels walk along them as they are. Wherever ops take indices they take either form.

Without the kernels, on other devices, and where they are few for the weight, so that many gaps are
wider than a byte, positions stay rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shira.errors import SupportError
from shira.ops import gaps, native
from shira.support import Support

LEAST_DENSITY = 1 / 200
"""Below this positions are not packed. At it they take 1.4 bytes each, 1.8 at the worst."""


def is_packed(indices: Tensor) -> bool:
    """Whether positions are packed: uint8 ``(n,)``, not integers ``(2, k)``."""
    return indices.dtype == torch.uint8 and indices.dim() == 1


def pack(coordinates: Tensor, shape: Sequence[int]) -> Tensor:
    """Positions as they are best kept.

    Args:
        coordinates: int32 ``(2, k)``: rows and columns of a weight, or packed positions.
        shape: Of the weight.

    Returns:
        uint8 ``(n,)``, the gaps; or ``coordinates`` themselves, if they are packed already, not on
        the CPU, below `LEAST_DENSITY`, or not sorted.
    """
    if not _packs(coordinates, shape):
        return coordinates
    try:
        support = Support.from_coordinates(shape, coordinates)
    except SupportError:  # a placeholder; whoever uses it says what is wrong
        return coordinates
    with torch.inference_mode(False):  # made in a first forward without gradients, used in others
        return torch.from_numpy(gaps.encode(support.indices.numpy(), widest="U8"))


def _packs(coordinates: Tensor, shape: Sequence[int]) -> bool:
    if is_packed(coordinates) or not coordinates.is_cpu or native.load().library is None:
        return False
    return coordinates.shape[-1] > LEAST_DENSITY * math.prod(shape)


def unpack(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse of `pack`: int32 ``(2, k)``, on the device of ``indices``."""
    return support_of(indices, shape).coordinates() if is_packed(indices) else indices


def support_of(indices: Tensor, shape: Sequence[int]) -> Support:
    """The positions as a support.

    Raises:
        SupportError: If they are out of range, unsorted or repeated.
    """
    if not is_packed(indices):
        return Support.from_coordinates(shape, indices)
    return from_gaps(indices, shape)


def from_gaps(units: Tensor, shape: Sequence[int]) -> Support:
    """The support whose gaps these are, in bytes or wider units; on their device.

    Raises:
        SupportError: If they are those of no support of such a weight.
    """
    flat = gaps.decode(units.detach().cpu().numpy(), math.prod(shape))
    return Support._trusted(shape, torch.from_numpy(flat).to(units.device))


def gaps_of(support: Support, packed: Tensor | None = None) -> native.Gaps:
    """A support on the CPU for the compiled kernels.

    Args:
        support: Which entries.
        packed: The same, packed: its memory is used.
    """
    if packed is None:
        units = gaps.encode(support.indices.numpy(), widest="U16")
        packed = torch.from_numpy(units)
    else:
        units = packed.numpy()
    return native.Gaps(packed, torch.from_numpy(gaps.marks(units)), support.nnz)
