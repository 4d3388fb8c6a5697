# SPDX-License-Identifier: Apache-2.0
"""`overlap`: what two adapters have in common, and how much they get in each other's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shira.adapter import Adapter
from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError
from shira.fusing.result import check_together
from shira.measure.figures import Estimate, Overlap, ParameterOverlap
from shira.measure.shared import shared_entries
from shira.measure.sparse import entries_of
from shira.measure.spectral import TOLERANCE, product_norm
from shira.measure.wide import ZERO, Wide, check_finite, dot
from shira.measure.zeros import EFFORT, zero_share
from shira.support import matrix_shape

Progress = Callable[[int, int], None]
"""Called with how many parameters are done, and of how many."""


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
    """How two adapters overlap, for each parameter of either and in all.

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
    """
    for adapter in (a, b):
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                f"overlap compares adapters, not {type(adapter).__name__}; Adapter.load reads one, "
                "Adapter.from_model takes one out of a model"
            )
    check_together((a, b), names, check_base=check_base)
    parameters = list(dict.fromkeys((*a, *b)))
    found = []
    for done, name in enumerate(parameters, 1):
        one, other = (adapter.get(name) for adapter in (a, b))
        for delta, of in zip((one, other), names, strict=True):
            if delta is not None:
                check_finite(delta.values, f"{name!r} of adapter {of!r}")
        measured = _positions(name, one, other)
        if interference:
            measured = _with_interference(measured, one, other, tolerance, effort, seed)
        found.append(measured)
        if progress is not None:
            progress(done, len(parameters))
    return Overlap(names[0], names[1], tuple(found), _whole(a, b))


def _whole(a: Adapter, b: Adapter) -> dict[str, str]:
    """Compare the whole tensors of two adapters, for `Overlap.whole`."""
    states = dict.fromkeys(a.tensors, "only in a")
    for name, tensor in b.tensors.items():
        if name not in states:
            states[name] = "only in b"
        else:
            states[name] = "equal" if same_tensor(a.tensors[name], tensor) else "different"
    return states


def _positions(name: str, a: SparseDelta | None, b: SparseDelta | None) -> ParameterOverlap:
    present = a if a is not None else b
    assert present is not None  # a name comes from one of the two
    shared = conflicts = 0
    common = ZERO
    if a is not None and b is not None:
        in_a, in_b = shared_entries(a.support, b.support)
        left, right = a.values.detach()[in_a], b.values.detach()[in_b]
        shared = in_a.numel()
        conflicts = int((left.sign() * right.sign() < 0).sum())
        common = dot(left, right)
    return ParameterOverlap(
        name=name,
        shape=matrix_shape(present.support.shape),
        nnz_a=0 if a is None else a.nnz,
        nnz_b=0 if b is None else b.nnz,
        shared=shared,
        sign_conflicts=conflicts,
        dot=common,
        square_a=_square(a),
        square_b=_square(b),
    )


def _with_interference(
    measured: ParameterOverlap,
    a: SparseDelta | None,
    b: SparseDelta | None,
    tolerance: float,
    effort: int,
    seed: int,
) -> ParameterOverlap:
    if a is None or b is None:
        return replace(measured, awom=Estimate(0.0), awor=Estimate(1.0))
    left, right = entries_of(a), entries_of(b)
    return replace(
        measured,
        awom=product_norm(left, right, tolerance=tolerance, seed=seed),
        awor=zero_share(left, right, measured.shape, effort=effort, seed=seed),
    )


def _square(delta: SparseDelta | None) -> Wide:
    return ZERO if delta is None else dot(delta.values, delta.values)
