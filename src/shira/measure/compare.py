# SPDX-License-Identifier: Apache-2.0
"""Where and by how much two adapters differ."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from shira.adapter import Adapter
from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError
from shira.measure.figures import finite_or_none
from shira.measure.shared import shared_entries
from shira.measure.wide import ZERO, Wide, dot, near_one, times_power, total


@dataclass(frozen=True)
class Comparison:
    """The difference of two adapters, as numbers.

    Attributes:
        equal: Whether they are equal bit for bit: parameters, positions, dtypes, values and whole
            tensors.
        only_in_a: Parameters of the first alone.
        only_in_b: Parameters of the second alone.
        unlike_shape: Parameters whose weights have different shapes; not looked at further.
        unlike_dtype: Parameters whose values have different dtypes; compared as numbers.
        positions_only_in_a: Positions of common parameters that only the first has.
        positions_only_in_b: Likewise of the second.
        shared: Positions that both have.
        differing: Shared positions at which the values differ as numbers.
        largest_difference: Largest absolute difference of values at any position of a common
            parameter; a position that one lacks counts as 0 there. Infinite beyond float64.
        relative_difference: Norm of the difference over the norm of the first, for common
            parameters; infinite if only the first is 0.
        where: The parameter with the largest difference.
        unlike_whole: Whole tensors that only one has, or that differ; not looked at further.
    """

    equal: bool
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    unlike_shape: tuple[str, ...]
    unlike_dtype: tuple[str, ...]
    positions_only_in_a: int
    positions_only_in_b: int
    shared: int
    differing: int
    largest_difference: float
    relative_difference: float
    where: str | None
    unlike_whole: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold."""
        made = asdict(self)
        for figure in ("largest_difference", "relative_difference"):
            made[figure] = finite_or_none(made[figure])
        return {key: list(v) if isinstance(v, tuple) else v for key, v in made.items()}

    def __str__(self) -> str:
        if self.equal:
            return f"equal, bit for bit ({self.shared:,} entries)"
        lines = [
            f"{self.shared:,} shared positions, {self.differing:,} with different values; "
            f"{self.positions_only_in_a:,} only in a, {self.positions_only_in_b:,} only in b",
            f"largest difference {self.largest_difference:.4g}"
            + (f" (in {self.where})" if self.where else "")
            + f", relative {self.relative_difference:.4g}",
        ]
        for label in ("only_in_a", "only_in_b", "unlike_shape", "unlike_dtype", "unlike_whole"):
            names = getattr(self, label)
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"{label.replace('_', ' ')}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)


@dataclass
class _Sums:
    only_a: int = 0
    only_b: int = 0
    shared: int = 0
    differing: int = 0
    square_a: Wide = ZERO
    square: Wide = ZERO
    largest: float = 0.0
    where: str | None = None
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)


def compare(a: Adapter, b: Adapter) -> Comparison:
    """What `Adapter.compare` documents."""
    for adapter in (a, b):
        if not isinstance(adapter, Adapter):
            raise AdapterError(f"adapters are compared, not {type(adapter).__name__}")
    sums = _Sums()
    for name in a:
        if name in b:
            _compare_delta(name, a[name], b[name], sums)
    if sums.square_a.mantissa:
        relative = float((sums.square / sums.square_a).root())
    else:
        relative = math.inf if sums.square.mantissa else 0.0
    return Comparison(
        equal=a == b,
        only_in_a=tuple(name for name in a if name not in b),
        only_in_b=tuple(name for name in b if name not in a),
        unlike_shape=tuple(sums.shapes),
        unlike_dtype=tuple(sums.dtypes),
        positions_only_in_a=sums.only_a,
        positions_only_in_b=sums.only_b,
        shared=sums.shared,
        differing=sums.differing,
        largest_difference=sums.largest,
        relative_difference=relative,
        where=sums.where,
        unlike_whole=tuple(
            name
            for name in dict.fromkeys((*a.tensors, *b.tensors))
            if name not in a.tensors
            or name not in b.tensors
            or not same_tensor(a.tensors[name], b.tensors[name])
        ),
    )


def _compare_delta(name: str, a: SparseDelta, b: SparseDelta, sums: _Sums) -> None:
    if a.support.shape != b.support.shape:
        sums.shapes.append(name)
        return
    if a.values.dtype != b.values.dtype:
        sums.dtypes.append(name)
    in_a, in_b = shared_entries(a.support, b.support)
    left, right = a.values.detach().double(), b.values.detach().double()
    sums.shared += in_a.numel()
    sums.only_a += a.nnz - in_a.numel()
    sums.only_b += b.nnz - in_b.numel()
    sums.differing += int((left[in_a] != right[in_b]).sum())
    sums.square_a = total((sums.square_a, dot(left, left)))
    exponent = max(near_one(left)[1], near_one(right)[1])  # so that no difference overflows
    left, right = times_power(left, -exponent), times_power(right, -exponent)
    # what is left of a is a - b where both are, and a elsewhere
    left[in_a] -= right[in_b]
    right[in_b] = 0.0
    for difference in (left, right):
        square = dot(difference, difference)
        sums.square = total((sums.square, Wide.of(square.mantissa, square.exponent + 2 * exponent)))
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        if float(Wide.of(largest, exponent)) > sums.largest:
            sums.largest, sums.where = float(Wide.of(largest, exponent)), name
