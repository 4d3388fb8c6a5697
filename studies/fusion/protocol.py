# SPDX-License-Identifier: Apache-2.0
"""What is fused, and how. Whoever changes it raises `PROTOCOL`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from studies.accuracy.protocol import Run as Training
from studies.store import key_of

PROTOCOL = 1

TASKS = ("trec6", "banking77", "subj")
"""Each keeps a head of its own; what is fused is the adapter of the encoder."""

SIZE = "small"

FAMILIES = {
    "lora": "lora",
    "same": "shira-random",
    "independent": "shira-random",
    "slots": "shira-random",
    "grad": "shira-grad",
}
"""Adapters of three tasks, and the method of the study of accuracy whose rate they are trained at.

``same``: one random mask for all three. ``independent``: a random mask for each, which share
positions by chance. ``slots``: disjoint random masks. ``grad``: a mask for each from its gradients.
"""

SEEDS = (1, 2, 3)

_DENSITY = {"density": 0.5}
SPARSE: dict[str, tuple[float, str, dict[str, Any]]] = {
    "sum": (1.0, "linear", {}),
    "mean": (1 / 3, "linear", {}),
    "ties": (1.0, "ties", _DENSITY),
    "dare_linear": (1.0, "dare_linear", _DENSITY),
    "dare_ties": (1.0, "dare_ties", _DENSITY),
    "della": (1.0, "della", _DENSITY),
    "magnitude_prune": (1.0, "magnitude_prune", _DENSITY),
    "magnitude": (1.0, "magnitude", {}),
}
"""Ways of fusing ours: weight of each adapter, ``combination_type`` and options."""

LOW_RANK: dict[str, tuple[float, str, dict[str, Any]]] = {
    "sum": (1.0, "cat", {}),
    "mean": (1 / 3, "cat", {}),
    "linear": (1.0, "linear", {}),
    "svd": (1.0, "svd", {}),
    "ties": (1.0, "ties", _DENSITY),
    "ties_svd": (1.0, "ties_svd", _DENSITY),
    "dare_linear": (1.0, "dare_linear", _DENSITY),
    "dare_ties": (1.0, "dare_ties", _DENSITY),
    "dare_linear_svd": (1.0, "dare_linear_svd", _DENSITY),
    "dare_ties_svd": (1.0, "dare_ties_svd", _DENSITY),
    "magnitude_prune": (1.0, "magnitude_prune", _DENSITY),
    "magnitude_prune_svd": (1.0, "magnitude_prune_svd", _DENSITY),
}
"""PEFT's ways of fusing LoRA. ``cat`` keeps every rank and is the exact weighted sum."""


@dataclass(frozen=True)
class Run:
    """Three adapters of a family, trained with one seed and fused in every way there is for them.

    `rate_exponent` e means a learning rate of ``10 ** (e / 2)``. The seed decides what it decides
    in a run of the study of accuracy.
    """

    family: str
    rate_exponent: int
    seed: int
    size: str = SIZE
    stage: str = "fusion"
    test_rows: int = 300
    protocol: int = PROTOCOL

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for this configuration."""
        return key_of(vars(self))

    @property
    def ways(self) -> dict[str, tuple[float, str, dict[str, Any]]]:
        """The ways of fusing this family."""
        return LOW_RANK if self.family == "lora" else SPARSE

    def training(self, task: str, **settings: int) -> Training:
        """How the adapter of a task is trained; `settings` overrides fields, for tests."""
        method = FAMILIES[self.family]
        settings = {"test_rows": self.test_rows, **settings}
        return Training("final", task, method, self.size, self.rate_exponent, self.seed, **settings)
