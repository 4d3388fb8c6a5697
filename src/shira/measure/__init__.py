# SPDX-License-Identifier: Apache-2.0
"""Looking at adapters: how two overlap, where they differ, what rank a delta has.

``overlaps``, ``compare`` and ``rank`` are what to call; ``figures`` holds the results, ``text``
prints them. ``shared`` finds common positions, ``zeros`` counts the zeros of ``A^T B`` (AWOR),
``spectral`` finds largest singular values (AWOM), on the ``sparse`` matrix that a delta is. Sits
above ``fusing``, whose checks it shares; knows of no model, file or PEFT.
"""

from __future__ import annotations

from shira.measure.compare import Comparison, compare
from shira.measure.figures import Estimate, Overlap, ParameterOverlap
from shira.measure.overlaps import overlap
from shira.measure.rank import Rank, numerical_rank

__all__ = [
    "Comparison",
    "Estimate",
    "Overlap",
    "ParameterOverlap",
    "Rank",
    "compare",
    "numerical_rank",
    "overlap",
]
