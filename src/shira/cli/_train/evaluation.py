# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation: loss and perplexity of a language model, accuracy and F1 of classes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_SPEEDS = ("runtime", "_per_second", "_preparation_time")


def evaluate(trainer: Any) -> dict[str, float]:
    """The figures of a Trainer's evaluation, without its timings; every process must call it."""
    figures = {
        name.removeprefix("eval_"): float(value)
        for name, value in trainer.evaluate().items()
        if name.startswith("eval_") and not name.endswith(_SPEEDS)
    }
    if trainer.compute_metrics is None:
        figures["perplexity"] = math.exp(min(figures["loss"], 700.0))
    return figures


def classification_figures(prediction: Any) -> dict[str, float]:
    """Accuracy, and the mean over the classes of F1 (a class that never occurs counts 0)."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    said, true = np.asarray(logits).argmax(axis=-1), np.asarray(prediction.label_ids)
    scores = []
    for label in range(np.asarray(logits).shape[-1]):
        hits = int(((said == label) & (true == label)).sum())
        scores.append(2 * hits / max(int((said == label).sum() + (true == label).sum()), 1))
    return {"accuracy": float((said == true).mean()), "macro_f1": float(np.mean(scores))}
