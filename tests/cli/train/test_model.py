# SPDX-License-Identifier: Apache-2.0
"""The adapter that the options describe."""

from __future__ import annotations

import pytest

from shira.cli.train.model import parse_targets
from shira.errors import TargetError


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("layers.0.q,layers.1.q", ["layers.0.q", "layers.1.q"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"layers\.\d{1,2}\.q", r"layers\.\d{1,2}\.q"),
    ],
)
def test_targets(text, targets):
    assert parse_targets(text) == targets


def test_targets_that_are_neither():
    with pytest.raises(TargetError, match="neither names nor a regular expression"):
        parse_targets("layers.(q")
