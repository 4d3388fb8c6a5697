# SPDX-License-Identifier: Apache-2.0
"""What is compared, and all that is held equal. Whoever changes it raises `PROTOCOL`."""

from __future__ import annotations

from dataclasses import dataclass

from studies.store import key_of

PROTOCOL = 2

SOURCE = "wikitext2"
TARGETS = ("tinyshakespeare", "python_code", "whitman_poetry")

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

METHODS = ("full", "lora", "dora", *SHIRA_MASKS)

GRIDS = {
    "full": (-6, -5, -4),
    "lora": (-5, -4, -3),
    "dora": (-5, -4, -3),
    **dict.fromkeys(SHIRA_MASKS, (-4, -3, -2)),
}
"""Rates to begin with, in half decades: e stands for 10 ** (e / 2)."""

BEYOND = 3
"""Where the best rate is the first or last of those tried, the next one is tried too: so often."""

BELOW = 4
"""How many still lower rates are tried, where need be, to compare forgetting at equal gain."""

TUNING_SEED = 0
FINAL_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Base:
    """How the base model is made: a small Llama, trained from scratch on `source` alone."""

    stage: str = "base"
    source: str = SOURCE
    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    window: int = 128
    block_windows: int = 16
    validation_windows: int = 160
    test_windows: int = 800
    steps: int = 1200
    batch_size: int = 8
    rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    look_every: int = 100
    seed: int = 0
    protocol: int = PROTOCOL

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for this configuration."""
        return key_of(vars(self))


BASE = Base()


@dataclass(frozen=True)
class Run:
    """The full configuration of one adaptation. Two of one configuration are the same run.

    `rate_exponent` e means a learning rate of ``10 ** (e / 2)``. The seed decides the windows that
    are trained on and their order, LoRA's first values and the random masks.
    """

    stage: str
    target: str
    method: str
    rate_exponent: int
    seed: int
    rank: int = 4
    steps: int = 40
    batch_size: int = 2
    warmup_steps: int = 4
    validation_windows: int = 32
    test_windows: int = 48
    calibration_batches: int = 8
    base: str = BASE.key
    protocol: int = PROTOCOL

    @property
    def rate(self) -> float:
        """The learning rate."""
        return rate_of(self.rate_exponent)

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for this configuration."""
        return key_of(vars(self))


def rate_of(exponent: int) -> float:
    """The learning rate of a half-decade exponent, to three digits."""
    return float(f"{10 ** (exponent / 2):.3g}")
