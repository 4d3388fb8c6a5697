# SPDX-License-Identifier: Apache-2.0
"""`SparseDelta`: a `Support` with a value for each of its entries."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from shira.base import accumulation_dtype, replacement
from shira.errors import AdapterError
from shira.support import Support


class SparseDelta:
    """The values that an adapter adds to one weight.

    Args:
        support: Which entries.
        values: ``(k,)`` floating point, one for each index, on the support's device.

    Raises:
        AdapterError: If the values are not 1-D floating point of the support's length.

    Example:
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([0, 4])), torch.tensor([0.5, -1.0]))
        >>> delta.replacement(torch.tensor([1.0, 1.0]), scale=2.0).tolist()
        [2.0, -1.0]
    """

    __slots__ = ("support", "values")

    def __init__(self, support: Support, values: Tensor) -> None:
        if not values.is_floating_point():
            raise AdapterError(f"values are floating point, not {values.dtype}")
        if values.dim() != 1 or values.numel() != support.nnz:
            raise AdapterError(
                f"{support.nnz} positions need values of shape ({support.nnz},), "
                f"not {tuple(values.shape)}"
            )
        self.support = support
        self.values = values

    @property
    def nnz(self) -> int:
        """The number of entries, k."""
        return self.support.nnz

    def replacement(self, base: Tensor, scale: float = 1.0) -> Tensor:
        """Return the values that take the place of the base's: ``round(base + scale * values)``.

        The sum is made in float32 (float64 if base or values are) and rounded once, to the base's
        dtype.

        Args:
            base: ``(k,)`` values of the base weight at the support.
            scale: Factor on the delta.

        Returns:
            ``(k,)`` in the dtype of ``base``.
        """
        if scale == 1.0:
            return replacement(base, self.values)
        wide = accumulation_dtype(base.dtype, self.values.dtype)
        return replacement(base, self.values.to(wide) * scale)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return (
            self.support == other.support
            and self.values.dtype == other.values.dtype
            and torch.equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def __repr__(self) -> str:
        return f"SparseDelta({self.support!r}, {self.values.dtype})"


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one dtype, one shape and equal values, on any devices."""
    return a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())


def checked_scale(adapter: str, scale: object) -> float:
    """Return the factor on an adapter as a float, if it is a finite real number and no bool."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise AdapterError(f"the scale of {adapter!r} is a number, not {scale!r:.100}")
    try:
        number = float(scale)
    except OverflowError:
        raise AdapterError(f"the scale of {adapter!r} is too large for a float") from None
    if not math.isfinite(number):
        raise AdapterError(f"the scale of {adapter!r} is a finite number, not {number}")
    return number
