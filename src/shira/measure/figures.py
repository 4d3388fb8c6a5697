# SPDX-License-Identifier: Apache-2.0
"""What is said of two adapters, as plain values: `Estimate`, `ParameterOverlap`, `Overlap`.

Sums are kept rather than ratios, so that the total of all parameters is made of the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shira.measure.text import text_table
from shira.measure.wide import Wide, ratio, total

FIGURE_NAMES = ("k a", "k b", "shared", "jaccard", "conflicts", "cosine", "AWOM", "AWOR")
"""Figures of an overlap in the order of a table."""


@dataclass(frozen=True)
class Estimate:
    """A figure and how far off it may be: 0 where it was computed exactly.

    Infinite if it is beyond float64, as products of values beyond 1e154 are.
    """

    value: float
    error: float = 0.0

    def as_json(self) -> dict[str, float | None]:
        """``{"value": ..., "error": ...}``, null for what is beyond float64."""
        return {"value": finite_or_none(self.value), "error": finite_or_none(self.error)}

    def times_power(self, exponent: int) -> Estimate:
        """Both times ``2^exponent``."""
        return Estimate(float(Wide.of(self.value, exponent)), float(Wide.of(self.error, exponent)))

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" +- {self.error:.1g}" if self.error else "")


@dataclass(frozen=True)
class ParameterOverlap:
    """How two deltas of one weight overlap.

    Attributes:
        name: The parameter.
        shape: Of the weight seen as a matrix, as it is stored: rows and columns.
        nnz_a: Entries of the first; 0 if it has no such parameter.
        nnz_b: Entries of the second.
        shared: Positions that both have.
        sign_conflicts: Shared positions at which one value is positive, the other negative.
        dot: Sum of the products of the values at shared positions, made in float64; a number
            wider than float64, as may be the next two: ``float()`` gives the nearest.
        square_a: Sum of the squares of the first's values.
        square_b: Sum of the squares of the second's.
        awom: AWOM, the spectral norm of ``A^T B`` (paper sec. 3.3); None if it was not asked for.
        awor: AWOR, the share of zeros in ``A^T B``, for columns^2 entries; likewise.
    """

    name: str
    shape: tuple[int, int]
    nnz_a: int
    nnz_b: int
    shared: int
    sign_conflicts: int
    dot: Wide
    square_a: Wide
    square_b: Wide
    awom: Estimate | None = None
    awor: Estimate | None = None

    @property
    def jaccard(self) -> float:
        """Shared positions over positions of either; 0 if there are none."""
        return _ratio(self.shared, self.nnz_a + self.nnz_b - self.shared)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, as vectors of the weight's size; 0 if one is 0."""
        return _cosine((self,))

    @property
    def conflict_share(self) -> float:
        """Sign conflicts over shared positions; 0 if there are none."""
        return _ratio(self.sign_conflicts, self.shared)

    @property
    def awor_of_random(self) -> float:
        """The AWOR of independent random masks of these densities: ``(1 - p_a p_b)^rows``."""
        rows, cols = self.shape
        share = _ratio(self.nnz_a, rows * cols) * _ratio(self.nnz_b, rows * cols)
        return float((1.0 - share) ** rows)

    def as_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold; figures that were not asked for are null."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "nnz_a": self.nnz_a,
            "nnz_b": self.nnz_b,
            "shared": self.shared,
            "jaccard": self.jaccard,
            "sign_conflicts": self.sign_conflicts,
            "cosine": self.cosine,
            "awom": None if self.awom is None else self.awom.as_json(),
            "awor": None if self.awor is None else self.awor.as_json(),
            "awor_of_random": self.awor_of_random,
        }


@dataclass(frozen=True)
class Overlap:
    """How two adapters overlap: parameter by parameter, and in all.

    Attributes:
        a: What the first is called.
        b: What the second is called.
        parameters: Of either adapter.
        whole: Whole tensors of either, by name: ``"only in a"``, ``"only in b"``, ``"equal"`` or
            ``"different"``. They count in no figure.
    """

    a: str
    b: str
    parameters: tuple[ParameterOverlap, ...]
    whole: Mapping[str, str] = field(default_factory=dict)

    @property
    def nnz_a(self) -> int:
        """Entries of the first."""
        return sum(p.nnz_a for p in self.parameters)

    @property
    def nnz_b(self) -> int:
        """Entries of the second."""
        return sum(p.nnz_b for p in self.parameters)

    @property
    def shared(self) -> int:
        """Positions that both have."""
        return sum(p.shared for p in self.parameters)

    @property
    def sign_conflicts(self) -> int:
        """Shared positions at which the signs differ."""
        return sum(p.sign_conflicts for p in self.parameters)

    @property
    def conflict_share(self) -> float:
        """Sign conflicts over shared positions; 0 if there are none."""
        return _ratio(self.sign_conflicts, self.shared)

    @property
    def jaccard(self) -> float:
        """Shared positions over positions of either; 0 if there are none."""
        return _ratio(self.shared, self.nnz_a + self.nnz_b - self.shared)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, all parameters strung together."""
        return _cosine(self.parameters)

    @property
    def awom(self) -> Estimate | None:
        """The spectral norm of the block-diagonal product of all: that of the largest block."""
        known = _known(p.awom for p in self.parameters)
        return (
            max(known, key=lambda e: e.value, default=Estimate(0.0)) if known is not None else None
        )

    @property
    def awor(self) -> Estimate | None:
        """The share of zeros in the products of all parameters together."""
        known = _known(p.awor for p in self.parameters)
        if known is None:
            return None
        sizes = [p.shape[1] ** 2 for p in self.parameters]
        total = sum(sizes)
        if not total:
            return Estimate(1.0)
        # errors of independent samples add up by their squares
        pairs = list(zip(known, sizes, strict=True))
        value = math.fsum(e.value * size for e, size in pairs) / total
        return Estimate(value, math.hypot(*(e.error * size for e, size in pairs)) / total)

    def as_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold."""
        return {
            "a": self.a,
            "b": self.b,
            "nnz_a": self.nnz_a,
            "nnz_b": self.nnz_b,
            "shared": self.shared,
            "jaccard": self.jaccard,
            "sign_conflicts": self.sign_conflicts,
            "cosine": self.cosine,
            "awom": None if self.awom is None else self.awom.as_json(),
            "awor": None if self.awor is None else self.awor.as_json(),
            "parameters": [p.as_json() for p in self.parameters],
            "whole_tensors": dict(self.whole),
        }

    def __str__(self) -> str:
        """A table to read: the total, then each parameter."""
        rows = [("parameter", *FIGURE_NAMES), ("all", *cells(self))]
        rows += [(p.name, *cells(p)) for p in self.parameters]
        whole = "".join(f"\nwhole tensor {name}: {state}" for name, state in self.whole.items())
        return f"a: {self.a}\nb: {self.b}\n{text_table(rows)}{whole}"


def cells(of: ParameterOverlap | Overlap) -> tuple[str, ...]:
    """Return `FIGURE_NAMES` of two adapters, or of one weight of them, as texts."""
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


def _known(estimates: Iterable[Estimate | None]) -> list[Estimate] | None:
    """All of them, or None if one was not asked for."""
    found = list(estimates)
    known = [estimate for estimate in found if estimate is not None]
    return known if len(known) == len(found) else None


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which knows no infinite one."""
    return value if math.isfinite(value) else None


def _cosine(parameters: Sequence[ParameterOverlap]) -> float:
    square_a, square_b = (
        total(p.square_a for p in parameters),
        total(p.square_b for p in parameters),
    )
    return ratio(total(p.dot for p in parameters), square_a.root() * square_b.root())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
