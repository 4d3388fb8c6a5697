# SPDX-License-Identifier: Apache-2.0
"""What is compared, and all that is held equal. Whoever changes it raises `PROTOCOL`."""

from __future__ import annotations

from dataclasses import dataclass

from studies.store import key_of

PROTOCOL = 2

BASE = "all-MiniLM-L6-v2"

TASKS = {
    "trec6": "accuracy",
    "cola": "matthews",
    "banking77": "accuracy",
    "subj": "accuracy",
    "ag_news": "accuracy",
}
"""Each task with its metric; the ones with the shortest texts first."""

TUNING_TASKS = ("trec6", "banking77", "subj")
"""Where rates are tuned: one rate for a method and size, by the mean over these tasks."""

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

GRIDS = {
    "head": (-6, -5, -4),
    "full": (-8, -7, -6),
    "lora": (-6, -5, -4),
    "dora": (-6, -5, -4),
    "peft-shira": (-5, -4, -3),
    **dict.fromkeys(SHIRA_MASKS, (-5, -4, -3)),
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
    ``head``: of the head). The seed decides the head's first values, the rows of each batch, LoRA's
    first values and the random masks. The first `frozen_blocks` blocks of the encoder are trained
    by no method. Batches are made of `group_batches` batches of rows, sorted by length.
    """

    stage: str
    task: str
    method: str
    size: str | None
    rate_exponent: int
    seed: int
    steps: int = 64
    batch_size: int = 16
    group_batches: int = 8
    max_tokens: int = 24
    warmup_steps: int = 6
    frozen_blocks: int = 3
    head_rate: float = 1e-2
    training_rows: int = 2000
    validation_rows: int = 300
    test_rows: int = 600
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
        return key_of(vars(self))


def rate_of(exponent: int) -> float:
    """The learning rate of a half-decade exponent, to three digits."""
    return float(f"{10 ** (exponent / 2):.3g}")


def cells() -> list[tuple[str, str | None]]:
    """Every method with every size it comes in; without size first, then by size."""
    sized = [method for method in METHODS if method not in UNSIZED]
    return [(method, None) for method in UNSIZED] + [(m, size) for size in SIZES for m in sized]
