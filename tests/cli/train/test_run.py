# SPDX-License-Identifier: Apache-2.0
"""The arguments of a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shira.cli.train.options import TrainOptions
from shira.cli.train.trainer import set_warmup


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"warmup": 0.1, "max_steps": 50}, 5),
        ({"warmup": 7.0, "max_steps": 50}, 7),
        ({"warmup": 0.0}, 0),
        ({"max_steps": 1}, 0),  # its one step would have a rate of 0
        # 100 rows in steps of 4 x 2 on 2 processes, twice over
        ({"warmup": 0.5, "batch_size": 4, "gradient_accumulation_steps": 2, "epochs": 2.0}, 7),
    ],
)
def test_warmup(options, steps):
    arguments = SimpleNamespace(world_size=2, warmup_steps=None)
    set_warmup(arguments, TrainOptions(**options), rows=100)
    assert arguments.warmup_steps == steps
