# SPDX-License-Identifier: Apache-2.0
"""The figures a task is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """The share of rows that got their own label."""
    return sum(p == t for p, t in zip(predicted, labels, strict=True)) / len(labels)


def matthews(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews' correlation of two labels, 0 and 1: in [-1, 1], and 0 where one is constant."""
    pairs = list(zip(predicted, labels, strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    if tp + fp + fn + tn != len(pairs):
        raise ValueError("Matthews' correlation is computed for the labels 0 and 1 alone")
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


METRICS = {"accuracy": accuracy, "matthews": matthews}
