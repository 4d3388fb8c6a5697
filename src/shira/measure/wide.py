# SPDX-License-Identifier: Apache-2.0
"""`Wide`: numbers beyond the range of float64, for sums of squares and products of any values.

The square of 1e200 is more than float64 holds, that of 1e-200 less, and float64 values go further
than either. Values are brought near 1 by a power of two first, which is exact; the power is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shira.errors import AdapterError

Values = TypeVar("Values", torch.Tensor, NDArray[np.float64])


@dataclass(frozen=True)
class Wide:
    """The number ``mantissa * 2^exponent``.

    Attributes:
        mantissa: 0, or of an absolute value from 1/2 up to 1.
        exponent: 0 if the mantissa is.
    """

    mantissa: float = 0.0
    exponent: int = 0

    @classmethod
    def of(cls, value: float, exponent: int = 0) -> Wide:
        """The number ``value * 2^exponent``, of a finite value."""
        mantissa, more = math.frexp(value)
        return cls(mantissa, exponent + more if mantissa else 0)

    def __float__(self) -> float:
        """The nearest float64; infinite if the number is beyond them all."""
        try:
            return math.ldexp(self.mantissa, self.exponent)
        except OverflowError:
            return math.copysign(math.inf, self.mantissa)

    def __mul__(self, other: Wide) -> Wide:
        return Wide.of(self.mantissa * other.mantissa, self.exponent + other.exponent)

    def __truediv__(self, other: Wide) -> Wide:
        return Wide.of(self.mantissa / other.mantissa, self.exponent - other.exponent)

    def __sub__(self, other: Wide) -> Wide:
        return total((self, Wide(-other.mantissa, other.exponent)))

    def root(self) -> Wide:
        """The square root; 0 of what is negative, as rounding may leave of a sum that is 0."""
        odd = self.exponent % 2
        return Wide.of(math.sqrt(max(math.ldexp(self.mantissa, odd), 0.0)), self.exponent // 2)


ZERO = Wide()


def total(numbers: Iterable[Wide]) -> Wide:
    """The sum of some numbers, rounded once but for what vanishes beside the largest."""
    known = [number for number in numbers if number.mantissa]
    most = max((number.exponent for number in known), default=0)
    return Wide.of(math.fsum(math.ldexp(n.mantissa, n.exponent - most) for n in known), most)


def ratio(part: Wide, whole: Wide) -> float:
    """One over the other; 0 if the other is 0."""
    return float(part / whole) if whole.mantissa else 0.0


def dot(left: torch.Tensor, right: torch.Tensor) -> Wide:
    """The sum of the products of finite values ``(k,)`` and ``(k,)``, made in float64."""
    (one, exponent), (other, more) = near_one(left), near_one(right)
    return Wide.of(float(one @ other), exponent + more)


def check_finite(values: torch.Tensor, whose: str) -> None:
    """Refuse values of which no figure can be made.

    Raises:
        AdapterError: If one is NaN or infinite; it names ``whose`` they are.
    """
    odd = int((~torch.isfinite(values)).sum())
    if odd:
        raise AdapterError(
            f"{odd} of the {values.numel()} values of {whose} are NaN or infinite: it cannot be "
            "measured; an adapter of a training that diverged has to be trained again"
        )


def near_one(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Finite values in float64 over a power of two, the largest from 1/2 up to 1; and the power."""
    wide = values.detach().double()
    exponent = math.frexp(float(wide.abs().max()))[1] if wide.numel() else 0
    return times_power(wide, -exponent), exponent


def times_power(values: Values, exponent: int) -> Values:
    """Float64 values times ``2^exponent``, in two steps, as the power may be beyond float64."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)
