# SPDX-License-Identifier: Apache-2.0
"""The largest singular value of what can only be multiplied with vectors: AWOM, and of one delta.

Golub-Kahan-Lanczos bidiagonalization with full reorthogonalization (Golub and Van Loan, Matrix
Computations, 4th ed., section 10.4.4): power iteration that forgets nothing, so that it needs tens
of products where power iteration needs thousands on the close spectra of random masks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shira.measure.figures import Estimate
from shira.measure.sparse import Entries, Floats, SparseMatrix

Product = Callable[[Floats], Floats]

TOLERANCE = 1e-4
STEPS = 300


def generator(seed: int) -> np.random.Generator:
    """Make the generator of a seed, any integer."""
    return np.random.Generator(np.random.Philox(key=seed % 2**128))


def product_norm(
    a: Entries, b: Entries, *, tolerance: float = TOLERANCE, seed: int = 0
) -> Estimate:
    """The spectral norm of ``A^T B``: AWOM (paper sec. 3.3), without making the product.

    Only rows that both have can contribute.

    Args:
        a: Entries of the first, sorted by row.
        b: Of the second.
        tolerance: Relative error at which to stop.
        seed: Of the starting vector.
    """
    a = a.where(np.isin(a.row, b.row))
    b = b.where(np.isin(b.row, a.row))
    if not a.row.size:
        return Estimate(0.0)
    (a, power), (b, more) = a.near_one(), b.near_one()
    left, right = SparseMatrix(a), SparseMatrix(b)  # with the same rows
    found = largest_singular_value(
        lambda v: left.transposed_dot(right.dot(v)),
        lambda u: right.transposed_dot(left.dot(u)),
        (left.shape[1], right.shape[1]),
        tolerance=tolerance,
        seed=seed,
    )
    return found.times_power(power + more)


def largest_singular_value(
    product: Product,
    transposed: Product,
    shape: tuple[int, int],
    *,
    tolerance: float = TOLERANCE,
    steps: int = STEPS,
    seed: int = 0,
) -> Estimate:
    """The spectral norm of a matrix.

    Args:
        product: ``M v``, float64 ``(n,)`` to ``(m,)``.
        transposed: ``M^T u``.
        shape: Of M.
        tolerance: Relative error at which to stop.
        steps: When to stop in any case.
        seed: Of the starting vector.

    Returns:
        The value, never too large but for rounding, and the residual: a singular value is certain
        to lie that near. That it is the largest is certain but for a start without a part in its
        direction, which has probability 0. Error 0 means that the iteration ended by itself.
    """
    if shape[0] < shape[1]:  # the vectors of the shorter side are spanned after as many steps
        product, transposed, shape = transposed, product, (shape[1], shape[0])
    steps = min(steps, shape[1])
    v = generator(seed).standard_normal(shape[1])
    v /= np.linalg.norm(v)
    right, left = np.empty((steps, shape[1])), np.empty((steps, shape[0]))
    diagonal, above = np.zeros(steps), np.zeros(steps)
    value = residual = 0.0
    for step in range(steps):
        right[step] = v
        u = _orthogonal(product(v), left[:step])
        diagonal[step] = _norm(u)
        if diagonal[step] > _tiny(value):
            u /= diagonal[step]
        else:
            diagonal[step], u = 0.0, np.zeros_like(u)
        left[step] = u
        v = _orthogonal(transposed(u), right[: step + 1])
        above[step] = _norm(v)
        small = np.diag(diagonal[: step + 1]) + np.diag(above[:step], 1)
        vectors, values, _ = np.linalg.svd(small)
        value, residual = float(values[0]), float(above[step] * abs(vectors[-1, 0]))
        if above[step] <= _tiny(value) or step + 1 == shape[1]:
            return Estimate(value)
        if residual <= tolerance * value:
            break
        v /= above[step]
    return Estimate(value, residual)


def _orthogonal(vector: Floats, basis: Floats) -> Floats:
    """The part of a vector that is orthogonal to the rows of a basis; twice is enough."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _norm(vector: Floats) -> float:
    """The norm of a vector whose squares may be too small for float64."""
    largest = np.abs(vector).max(initial=0.0)
    return float(largest * np.linalg.norm(vector / largest)) if largest else 0.0


def _tiny(value: float) -> float:
    """What counts as nothing beside a value."""
    return 1e-13 * value
