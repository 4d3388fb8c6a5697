# SPDX-License-Identifier: Apache-2.0
"""Results of `overlap` as plain values, and sums that no square overflows.

The square of 1e200 is more than float64 holds, that of 1e-200 less, and values go further than
either. So values are brought near 1 by a power of two first, which is exact, and a sum is kept as
`Scaled`: the number and the power.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shira.errors import AdapterError

Floats: TypeAlias = NDArray[np.float64]
Scaled: TypeAlias = tuple[float, int]
"""``(value, exponent)``: the number ``value * 2^exponent``."""
_Values = TypeVar("_Values", torch.Tensor, Floats)


def near_one(values: _Values) -> tuple[_Values, int]:
    """Divide float64 values by a power of two, and return it: the largest is from 1/2 up to 1."""
    exponent = math.frexp(float(abs(values).max()))[1] if len(values) else 0
    half = exponent // 2  # the power itself may be beyond float64
    scaled = values * 2.0**-half
    scaled *= 2.0 ** (half - exponent)
    return scaled, exponent


def dot(left: torch.Tensor, right: torch.Tensor) -> Scaled:
    """Sum the products of finite values ``(k,)`` and ``(k,)``, in float64."""
    one, exponent = near_one(left.double())
    other, more = (one, exponent) if right is left else near_one(right.double())
    return float(one @ other), exponent + more


def total(numbers: Iterable[Scaled]) -> Scaled:
    """Add numbers, rounded once but for what vanishes beside the largest."""
    known = [(value, exponent) for value, exponent in numbers if value]
    most = max((exponent for _, exponent in known), default=0)
    return math.fsum(math.ldexp(value, exponent - most) for value, exponent in known), most


def ldexp(value: float, exponent: int) -> float:
    """Return ``value * 2^exponent``; infinite beyond float64."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def cosine_of(common: Scaled, square_a: Scaled, square_b: Scaled) -> float:
    """Return a dot product over the roots of two sums of squares; 0 if one is 0."""
    if not square_a[0] or not square_b[0]:
        return 0.0
    cosine = common[0] / math.sqrt(square_a[0]) / math.sqrt(square_b[0])
    return ldexp(cosine, common[1] - (square_a[1] + square_b[1]) // 2)  # both are even


def check_finite(values: torch.Tensor, whose: str) -> None:
    """Refuse values of which no figure can be made; ``whose`` they are is for the message."""
    odd = int((~torch.isfinite(values)).sum())
    if odd:
        raise AdapterError(
            f"{odd} of the {values.numel()} values of {whose} are NaN or infinite: it cannot be "
            "measured; an adapter of a training that diverged has to be trained again"
        )


def finite_or_none(value: float) -> float | None:
    """Return a number for JSON, which knows no infinite one."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Estimate:
    """A figure and how far off it may be: 0 where it was computed exactly.

    Infinite if it is beyond float64, as products of values beyond 1e154 are.
    """

    value: float
    error: float = 0.0

    def as_json(self) -> dict[str, float | None]:
        """Return ``{"value": ..., "error": ...}``, null for what is beyond float64."""
        return {"value": finite_or_none(self.value), "error": finite_or_none(self.error)}

    def times_power(self, exponent: int) -> Estimate:
        """Multiply both by ``2^exponent``."""
        return Estimate(ldexp(self.value, exponent), ldexp(self.error, exponent))

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" +- {self.error:.1g}" if self.error else "")


@dataclass(frozen=True, kw_only=True)
class OverlapFigures:
    """The figures of two deltas, or of two adapters.

    Attributes:
        nnz_a: Entries of the first; 0 if it has no such parameter.
        nnz_b: Entries of the second.
        shared: Positions that both have.
        sign_conflicts: Shared positions at which one value is positive, the other negative.
        cosine: Cosine of the angle between the two, as vectors of the weight's size, or of all
            parameters strung together; 0 if one is 0.
        awom: AWOM, the spectral norm of ``A^T B`` (paper sec. 3.3); of adapters that of the
            block-diagonal product of all, which is that of the largest block. None if it was not
            asked for.
        awor: AWOR, the share of zeros in ``A^T B``, for columns^2 entries, or in the products of
            all parameters together; likewise.
    """

    nnz_a: int
    nnz_b: int
    shared: int
    sign_conflicts: int
    cosine: float
    awom: Estimate | None = None
    awor: Estimate | None = None

    @property
    def jaccard(self) -> float:
        """Shared positions over positions of either; 0 if there are none."""
        return _ratio(self.shared, self.nnz_a + self.nnz_b - self.shared)

    @property
    def conflict_share(self) -> float:
        """Sign conflicts over shared positions; 0 if there are none."""
        return _ratio(self.sign_conflicts, self.shared)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it; figures that were not asked for are null."""
        names = ("nnz_a", "nnz_b", "shared", "jaccard", "sign_conflicts", "cosine", "awom", "awor")
        told = {name: getattr(self, name) for name in names}
        return {name: v.as_json() if isinstance(v, Estimate) else v for name, v in told.items()}


@dataclass(frozen=True, kw_only=True)
class ParameterOverlap(OverlapFigures):
    """The overlap of two deltas of one weight, with the figures of `OverlapFigures`.

    Attributes:
        name: The parameter.
        shape: Of the weight seen as a matrix, as it is stored: rows and columns.
        dot: Sum of the products of the values at shared positions, made in float64; infinite beyond
            it, as the next two.
        square_a: Sum of the squares of the first's values.
        square_b: Sum of the squares of the second's.
    """

    name: str
    shape: tuple[int, int]
    dot: float
    square_a: float
    square_b: float

    @property
    def awor_of_random(self) -> float:
        """The AWOR of independent random masks of these densities: ``(1 - p_a p_b)^rows``."""
        rows, cols = self.shape
        share = _ratio(self.nnz_a, rows * cols) * _ratio(self.nnz_b, rows * cols)
        return float((1.0 - share) ** rows)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it; figures that were not asked for are null."""
        head = {"name": self.name, "shape": list(self.shape)}
        return {**head, **super().as_json(), "awor_of_random": self.awor_of_random}


@dataclass(frozen=True, kw_only=True)
class Overlap(OverlapFigures):
    """The overlap of two adapters by parameter, and the figures of `OverlapFigures` in all.

    Attributes:
        a: Name of the first.
        b: Name of the second.
        parameters: Of either adapter.
        whole: Whole tensors of either, by name: ``"only in a"``, ``"only in b"``, ``"equal"`` or
            ``"different"``. They count in no figure.
    """

    a: str
    b: str
    parameters: tuple[ParameterOverlap, ...]
    whole: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "a": self.a,
            "b": self.b,
            **super().as_json(),
            "parameters": [p.as_json() for p in self.parameters],
            "whole_tensors": dict(self.whole),
        }

    def __str__(self) -> str:
        """Return a table to read: the total, then each parameter."""
        rows = [("parameter", *FIGURE_NAMES), ("all", *cells(self))]
        rows += [(p.name, *cells(p)) for p in self.parameters]
        whole = "".join(f"\nwhole tensor {name}: {state}" for name, state in self.whole.items())
        return f"a: {self.a}\nb: {self.b}\n{_text_table(rows)}{whole}"


FIGURE_NAMES = ("k a", "k b", "shared", "jaccard", "conflicts", "cosine", "AWOM", "AWOR")
"""Heads of the columns of `cells`."""


def cells(of: OverlapFigures) -> tuple[str, ...]:
    """Return a row of a table of overlaps: each of `FIGURE_NAMES` as text."""
    return (
        f"{of.nnz_a:,}",
        f"{of.nnz_b:,}",
        f"{of.shared:,}",
        f"{of.jaccard:.4f}",
        f"{of.sign_conflicts:,}",
        f"{of.cosine:+.4f}",
        "-" if of.awom is None else str(of.awom),
        "-" if of.awor is None else str(of.awor),
    )


def _text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align cells; the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ((row[0].ljust(first), *map(str.rjust, row[1:], others)) for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
