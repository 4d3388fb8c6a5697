# SPDX-License-Identifier: Apache-2.0
"""Looking at adapters; knows of no model, file or PEFT.

::

    pairs     overlap and compare: two adapters held against each other
    rank      the numerical rank of a delta
    matrix    largest singular values (AWOM) and zeros of A^T B (AWOR), from entries alone
    figures   the results of overlap, and sums that do not overflow
"""

from __future__ import annotations

from shira.measure.figures import Estimate, Overlap, OverlapFigures, ParameterOverlap
from shira.measure.pairs import Comparison, compare, overlap
from shira.measure.rank import Rank, numerical_rank

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
