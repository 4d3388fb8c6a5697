# SPDX-License-Identifier: Apache-2.0
"""Figures of values: against torch, in parts, and what bfloat16 swallows."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shira.cli.summary import Figures, vanishing

FLOATS = st.floats(-1e3, 1e3, width=32)


@given(st.lists(FLOATS, min_size=1), st.lists(FLOATS))
def test_parts_add_up_to_the_whole(first, second):
    whole = torch.tensor([*first, *second], dtype=torch.float64)
    assert asdict(Figures.of([torch.tensor(first), torch.tensor(second)])) == {
        "min": whole.min().item(),
        "max": whole.max().item(),
        "mean_abs": pytest.approx(whole.abs().mean().item(), abs=1e-9),
        "std": pytest.approx(whole.std(correction=0).item(), rel=1e-4, abs=1e-3),
        "zeros": int((whole == 0).sum()),
    }


def test_no_values_have_no_figures():
    assert asdict(Figures.of([torch.zeros(0)])) == {
        **dict.fromkeys(("min", "max", "mean_abs", "std")),
        "zeros": 0,
    }


@given(st.lists(st.tuples(FLOATS, st.floats(-0.0078125, 0.0078125, width=32)), min_size=1))
def test_vanishing_is_what_a_bfloat16_model_does_not_see(pairs):
    base, delta = torch.tensor(pairs).unbind(1)
    held = base.bfloat16()
    changed = (held.float() + delta).bfloat16()
    expected = sum(bool(d != 0 and h == c) for h, c, d in zip(held, changed, delta, strict=True))
    assert vanishing(base, delta) == expected


def test_vanishing_near_one():
    # bfloat16 keeps 8 bits: beside 1, steps of 1/128 above and 1/256 below
    base = torch.ones(5)
    delta = torch.tensor([0.0, 1e-3, 1 / 128, -1e-3, -1 / 256])
    assert vanishing(base, delta) == 2
