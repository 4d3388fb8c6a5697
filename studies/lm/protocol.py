# SPDX-License-Identifier: Apache-2.0
"""What is compared, and all that is held equal.

Whoever changes a method or what is held equal raises `PROTOCOL`; a method may be added without.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from studies.store import key_of

PROTOCOL = 2

BASE = "SmolLM2-135M-Instruct"
SOURCE = "wikitext2"
TEXTS = ("tinyshakespeare", "python_code", "whitman_poetry", "devils_dictionary")
CHOICES = "multiple_choice"
SETS = ("arc_easy", "openbookqa", "boolq")
"""The sets of questions that `CHOICES` is a mix of, in equal parts."""

TARGETS = (*TEXTS, CHOICES)
TUNING_TARGETS = ("tinyshakespeare", "python_code", CHOICES)
"""Where rates are tuned. The first is the screen, where every method is tried at the first size.

Those that enter are tuned on all of these there, and at the other sizes on the first alone.
"""

SIZES = {"small": 4, "large": 16}
"""r of LoRA and of SHiRA: r * (m + n) parameters for an m x n weight."""

LOW_RANK = ("lora", "rslora", "dora")
SPARSE = (
    "random",
    "magnitude",
    "block",
    "block_diagonal",
    "grad",
    "principal",
    "gallop",
    "grad+global",
    "random+relative",
    "magnitude+relative",
    "random+renewed",
    "principal+renewed",
    "random+relative+factored",
    "principal+factored",
    "magnitude+relative+factored",
    "principal+relative+factored",
)
"""Ours: a mask, and what is done beside it. ``principal`` and ``gallop``: see `studies.lm.scores`.

``+global``: one threshold for all layers on scores divided by their layer's mean, rounded to whole
ranks. ``+relative``: each weight's rate in proportion to its standard deviation. ``+renewed``:
positions chosen anew during training, see `studies.lm.renew`. ``+factored``: Adam's second moments
by rows and columns, see `shira.FactoredAdamW`.
"""
METHODS = ("full", *LOW_RANK, "peft-shira", *SPARSE)
UNSIZED = ("full",)

GRIDS: dict[str, tuple[float, ...]] = {
    "full": (-12, -11, -10),
    **dict.fromkeys(("lora", "dora"), (-9, -8, -7, -6)),
    "rslora": (-10, -9, -8, -7),
    **dict.fromkeys(("peft-shira", *SPARSE), (-8, -7, -6, -5)),
    **dict.fromkeys(("grad", "gallop", "grad+global"), (-10, -9, -8, -7)),
    **dict.fromkeys((m for m in SPARSE if m.endswith("+factored")), (-8.5, -7.5, -6.5, -5.5)),
}
"""Rates to begin with, in thirds of a decade: e stands for 10 ** (e / 3)."""

BEYOND = 2
"""Where the best rate is the first or last of those tried, the next one is tried too: so often."""

LOOK = (("lora", "random", "magnitude", "principal"), "tinyshakespeare", "small")
"""Methods, target and size of the tuning runs that are made first."""
LOOK_ORDER = (1, 2, 0, 3)
"""In which order it goes through a method's rates: the ones in the middle first."""

TUNING_SEED = 0
FINAL_SEEDS = (1, 2, 3, 4, 5)
STRENGTHS = (0.5, 0.75)
"""Final runs are also measured with so much of the adapter, to compare at equal gain."""

GAIN = 0.85
"""Equal gain: so much of what the best low-rank method of a size gains on the target."""

ENTER = (2, 2)
BEST = (2, 1)
"""Of ours so many are tuned, and so many enter a size's finals.

The first number: by the lowest loss on the tuning targets. The second: of the others by the
smallest loss added to the source at equal gain.
"""

FINAL_LOW_RANK = ("lora", "rslora")
"""In the finals beside ours, with the best of `LOW_RANK` where that is another."""

RENEWED_SHARE = 0.3
RENEWED_AT = (0.2, 0.4, 0.6)
"""Renewal: the share of an adapter's positions that go, and when, as a share of the steps."""

CALIBRATION_BATCHES = 4
PRINCIPAL_RANK = 32
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Device:
    """Sizes of the runs on a kind of device. Runs of two kinds are never compared."""

    dtype: str
    steps: int
    batch: int
    window: int
    validation: int
    test: int
    rows: int
    """``validation`` and ``test`` count windows; ``rows`` questions of a set, twice for test."""


DEVICES = {
    "cpu": Device("bfloat16", steps=40, batch=2, window=128, validation=16, test=24, rows=16),
    "cuda": Device("bfloat16", steps=100, batch=8, window=128, validation=64, test=128, rows=100),
}


@dataclass(frozen=True)
class Run:
    """The full configuration of one adaptation. Two of one configuration are the same run.

    `rate_exponent` e means a learning rate of ``10 ** (e / 3)``. The seed decides the windows that
    are trained on and their order, LoRA's first values and the random masks. A training batch has
    `batch` windows of `window` tokens, or four times as many questions.
    """

    stage: str
    target: str
    method: str
    size: str | None
    rate_exponent: float
    seed: int
    device: str
    dtype: str
    steps: int
    batch: int
    window: int
    validation: int
    test: int
    rows: int
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
        return _key(self)


@functools.cache
def _key(run: Run) -> str:
    return key_of(vars(run))


@dataclass(frozen=True)
class Arm:
    """A kind of device and a dtype: runs of one arm are compared with each other."""

    device: str
    dtype: str

    def run(
        self, stage: str, target: str, method: str, size: str | None, exponent: float, seed: int
    ) -> Run:
        """A run of this arm."""
        sizes = {**vars(DEVICES[self.device]), "dtype": self.dtype}
        return Run(stage, target, method, size, exponent, seed, self.device, **sizes)


def arm_of(device: str, dtype: str | None = None) -> Arm:
    """The arm of a device, in its own dtype unless another is named."""
    return Arm(device, dtype or DEVICES[device].dtype)


def rate_of(exponent: float) -> float:
    """The learning rate of an exponent, to three digits."""
    return float(f"{10 ** (exponent / 3):.3g}")


def size_of(method: str, size: str) -> str | None:
    """`size`, or None for a method that comes in one size."""
    return None if method in UNSIZED else size
