# SPDX-License-Identifier: Apache-2.0
"""Looking at adapters: `overlap` and `compare` of two, the numerical rank of a delta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.delta import same_tensor
from shira.errors import listed
from shira.fusing import Progress
from shira.fusing.methods import select
from shira.fusing.result import check_adapters, check_together
from shira.measure.figures import (
    Estimate,
    Overlap,
    OverlapFigures,
    ParameterOverlap,
    Scaled,
    check_finite,
    cosine_of,
    dot,
    finite_or_none,
    ldexp,
    near_one,
    total,
)
from shira.measure.matrix import (
    EFFORT,
    TOLERANCE,
    Rank,
    entries_of,
    numerical_rank,
    product_norm,
    zero_share,
)
from shira.support import Support, matrix_shape

__all__ = [
    "Comparison",
    "Estimate",
    "Overlap",
    "OverlapFigures",
    "ParameterOverlap",
    "Rank",
    "compare",
    "numerical_rank",
    "overlap",
]


def overlap(
    a: Adapter,
    b: Adapter,
    *,
    interference: bool = True,
    tolerance: float = TOLERANCE,
    effort: int = EFFORT,
    seed: int = 0,
    check_base: bool = True,
    names: tuple[str, str] = ("a", "b"),
    progress: Progress | None = None,
) -> Overlap:
    """Measure how two adapters overlap, for each parameter of either and in all.

    Shared positions, Jaccard index, sign conflicts and cosine are exact and cost O(k). The paper's
    measures of interference (sec. 3.3) look at ``A^T B``, A and B the deltas as matrices, as they
    are stored: AWOM, its spectral norm, is found by Lanczos iteration to a relative ``tolerance``;
    AWOR, its share of zeros, is counted exactly as long as that takes no more than ``effort``, else
    estimated from some of its rows. Both carry their error. That an entry's terms cancel exactly is
    not looked for, so AWOR depends on positions alone.

    Args:
        a: An adapter.
        b: Another, of the same base model.
        interference: Compute AWOM and AWOR, which take the longer time.
        tolerance: Relative error of AWOM at which to stop.
        effort: 64-bit words to go through for the AWOR of one weight: 2^27 take about a second.
        seed: Of starting vectors and draws; no global generator is used.
        check_base: Refuse adapters that record different base models.
        names: What to call the two.
        progress: Told after each parameter how far it is.

    Raises:
        AdapterError: If one is no adapter, a parameter has different shapes, or a value is not
            finite.
        WrongBaseError: If they were trained on different base models.

    Example:
        >>> supports = [Support((2, 3), torch.tensor(at)) for at in ([0, 4], [4, 5])]
        >>> a, b = (Adapter({"w": SparseDelta(at, torch.ones(2))}) for at in supports)
        >>> found = overlap(a, b)
        >>> found.shared, round(found.cosine, 3), found.awom.value, found.awor.value
        (1, 0.5, 1.4142135623730951, 0.7777777777777778)
    """
    check_adapters(a, b)
    check_together((a, b), names, check_base=check_base)
    parameters = list(dict.fromkeys((*a, *b)))
    found: list[ParameterOverlap] = []
    sums: list[tuple[Scaled, Scaled, Scaled]] = []
    for done, name in enumerate(parameters, 1):
        absent = select(a[name] if name in a else b[name], torch.empty(0, dtype=torch.int64))
        one, other = (adapter.get(name, absent) for adapter in (a, b))
        for delta, of in zip((one, other), names, strict=True):
            check_finite(delta.values, f"{name!r} of adapter {of!r}")
        in_a, in_b = _shared_entries(one.support, other.support)
        of_a, of_b = one.values.detach(), other.values.detach()
        left, right = of_a[in_a], of_b[in_b]
        sums.append((dot(left, right), dot(of_a, of_a), dot(of_b, of_b)))
        common, square_a, square_b = (ldexp(*number) for number in sums[-1])
        shape, awom, awor = matrix_shape(one.support.shape), None, None
        if interference:
            both = entries_of(one), entries_of(other)
            awom = product_norm(*both, tolerance=tolerance, seed=seed)
            awor = zero_share(*both, shape, effort=effort, seed=seed)
        found.append(
            ParameterOverlap(
                name=name,
                shape=shape,
                nnz_a=one.nnz,
                nnz_b=other.nnz,
                shared=in_a.numel(),
                sign_conflicts=int((left.sign() * right.sign() < 0).sum()),
                dot=common,
                square_a=square_a,
                square_b=square_b,
                cosine=cosine_of(*sums[-1]),
                awom=awom,
                awor=awor,
            )
        )
        if progress is not None:
            progress(done, len(parameters))
    norms = [p.awom for p in found if p.awom is not None]
    return Overlap(
        a=names[0],
        b=names[1],
        parameters=tuple(found),
        whole=_whole_states(a, b),
        nnz_a=a.nnz,
        nnz_b=b.nnz,
        shared=sum(p.shared for p in found),
        sign_conflicts=sum(p.sign_conflicts for p in found),
        cosine=cosine_of(*(total(of[i] for of in sums) for i in range(3))),
        awom=max(norms, key=lambda e: e.value, default=Estimate(0.0)) if interference else None,
        awor=_mean_awor(found) if interference else None,
    )


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
        """Return everything as JSON can hold it."""
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
            if names := getattr(self, label):
                lines.append(f"{label.replace('_', ' ')}: {listed(names)}")
        return "\n".join(lines)


def compare(a: Adapter, b: Adapter) -> Comparison:
    """Tell where and by how much two adapters differ; see `Adapter.compare`.

    Raises:
        AdapterError: If one is no adapter.

    Example:
        >>> support = Support((2, 3), torch.tensor([0, 4]))
        >>> a, b = (Adapter({"w": SparseDelta(support, torch.tensor([1.0, x]))}) for x in (2, 5))
        >>> compare(a, b).differing, compare(a, b).largest_difference
        (1, 3.0)
    """
    check_adapters(a, b)
    common = {name: (a[name], b[name]) for name in a if name in b}
    unlike_shape = [n for n, (x, y) in common.items() if x.support.shape != y.support.shape]
    alike = {name: pair for name, pair in common.items() if name not in unlike_shape}
    shared = differing = only_in_a = only_in_b = 0
    squares: tuple[list[Scaled], list[Scaled]] = ([], [])  # of the difference, of a
    largest, where = 0.0, None
    for name, (one, other) in alike.items():
        left, right = one.values.detach().double(), other.values.detach().double()
        in_a, in_b = _shared_entries(one.support, other.support)
        shared += in_a.numel()
        only_in_a += one.nnz - in_a.numel()
        only_in_b += other.nnz - in_b.numel()
        differing += int((left[in_a] != right[in_b]).sum())
        squares[1].append(dot(left, left))
        both, exponent = near_one(torch.cat((left, right)))  # so that no difference overflows
        left, right = both[: one.nnz], both[one.nnz :]
        # what is left of a is a - b where both are, and a elsewhere
        left[in_a] -= right[in_b]
        right[in_b] = 0.0
        square, more = dot(both, both)
        squares[0].append((square, more + 2 * exponent))
        furthest = ldexp(float(both.abs().max()), exponent) if both.numel() else 0.0
        if furthest > largest:
            largest, where = furthest, name
    (square, exponent), (square_a, exponent_a) = map(total, squares)
    if square_a:
        relative = ldexp(math.sqrt(square / square_a), (exponent - exponent_a) // 2)
    else:
        relative = math.inf if square else 0.0
    return Comparison(
        equal=a == b,
        only_in_a=tuple(name for name in a if name not in b),
        only_in_b=tuple(name for name in b if name not in a),
        unlike_shape=tuple(unlike_shape),
        unlike_dtype=tuple(n for n, (x, y) in alike.items() if x.values.dtype != y.values.dtype),
        positions_only_in_a=only_in_a,
        positions_only_in_b=only_in_b,
        shared=shared,
        differing=differing,
        largest_difference=largest,
        relative_difference=relative,
        where=where,
        unlike_whole=tuple(n for n, state in _whole_states(a, b).items() if state != "equal"),
    )


def _mean_awor(parameters: Sequence[ParameterOverlap]) -> Estimate:
    """Average AWOR over the entries of all products."""
    known = [(p.awor, p.shape[1] ** 2) for p in parameters if p.awor is not None]
    size = sum(size for _, size in known)
    if not size:
        return Estimate(1.0)
    # errors of independent samples add up by their squares
    value = math.fsum(e.value * size for e, size in known) / size
    return Estimate(value, math.hypot(*(e.error * size for e, size in known)) / size)


def _shared_entries(a: Support, b: Support) -> tuple[Tensor, Tensor]:
    """Find the shared positions of two supports: int64 ``(shared,)`` entries of each, in order."""
    if a == b:
        everything = torch.arange(a.nnz, device=a.indices.device)
        return everything, everything
    merged, order = torch.sort(torch.cat((a.indices, b.indices)), stable=True)
    # stable: of two equal indices that of a comes first; twice as fast as positions_of
    at = (merged[1:] == merged[:-1]).nonzero().squeeze(1)
    return order[at], order[at + 1] - a.nnz


def _whole_states(a: Adapter, b: Adapter) -> dict[str, str]:
    """Compare the whole tensors of two adapters, for `Overlap.whole`."""
    states = dict.fromkeys(a.tensors, "only in a") | dict.fromkeys(b.tensors, "only in b")
    for name in a.tensors.keys() & b.tensors.keys():
        same = same_tensor(a.tensors[name], b.tensors[name])
        states[name] = "equal" if same else "different"
    return states
