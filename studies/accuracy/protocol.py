# SPDX-License-Identifier: Apache-2.0
"""What is compared, and all that is held equal. Whoever changes it raises `PROTOCOL`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

PROTOCOL = 1

BASE = "all-MiniLM-L6-v2"

TASKS = {
    "trec6": "accuracy",
    "cola": "matthews",
    "banking77": "accuracy",
    "subj": "accuracy",
    "ag_news": "accuracy",
}
"""Each task with its metric; the ones with the shortest texts first."""

SIZES = {"small": 3, "large": 8}
"""r of LoRA and of SHiRA: r * (m + n) parameters for an m x n weight, 1.2 % and 3.1 % in all."""

UNSIZED = ("head", "full")
SHIRA_MASKS = {
    "shira-random": ("random", None),
    "shira-struct": ("struct", None),
    "shira-magnitude": ("magnitude", None),
    "shira-smallest": ("magnitude", {"largest": False}),
    "shira-grad": ("grad", None),
    "shira-snip": ("snip", None),
    "shira-block": ("block", None),
    "shira-block-diagonal": ("block_diagonal", None),
}
"""Our methods: mask type and its options."""

METHODS = ("head", "full", "lora", "dora", "peft-shira", *SHIRA_MASKS)

_LOW_RANK = (-7, -6, -5, -4)
_SPARSE = (-6, -5, -4, -3)
GRIDS = {
    "head": (-5, -4, -3, -2),
    "full": (-9, -8, -7, -6),
    "lora": _LOW_RANK,
    "dora": _LOW_RANK,
    "peft-shira": _SPARSE,
    **dict.fromkeys(SHIRA_MASKS, _SPARSE),
}
"""Rates to begin with, in half decades: e stands for 10 ** (e / 2)."""

BEYOND = 2
"""Where the best rate is the first or last of those tried, the next one is tried too: so often."""

TUNING_SEED = 0
FINAL_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Run:
    """The full configuration of one run. Two runs of one configuration are the same run.

    `rate_exponent` e means a learning rate of ``10 ** (e / 2)`` for what adapts the encoder (for
    ``head``: of the head). The seed decides the head's first values, the order of the rows,
    dropout, LoRA's first values and the random masks.
    """

    stage: str
    task: str
    method: str
    size: str | None
    rate_exponent: int
    seed: int
    steps: int = 150
    batch_size: int = 16
    max_tokens: int = 64
    warmup_steps: int = 10
    head_rate: float = 1e-2
    validation_rows: int = 500
    test_rows: int = 1000
    calibration_batches: int = 8
    base: str = BASE
    protocol: int = PROTOCOL

    @property
    def rate(self) -> float:
        """The learning rate."""
        return rate_of(self.rate_exponent)

    @property
    def rank(self) -> int | None:
        """r, for methods that have a size."""
        return None if self.size is None else SIZES[self.size]

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for this configuration."""
        text = json.dumps(vars(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def rate_of(exponent: int) -> float:
    """The learning rate of a half-decade exponent, to three digits."""
    return float(f"{10 ** (exponent / 2):.3g}")


def cells() -> list[tuple[str, str | None]]:
    """Every method with every size it comes in; without size first, then by size."""
    sized = [method for method in METHODS if method not in UNSIZED]
    return [(method, None) for method in UNSIZED] + [(m, size) for size in SIZES for m in sized]
