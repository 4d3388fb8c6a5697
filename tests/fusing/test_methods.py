# SPDX-License-Identifier: Apache-2.0
"""The table of methods: a row is enough for a new one, and all that lists methods follows it."""

from __future__ import annotations

import re

import torch

from shira import Adapter, SparseDelta, fuse
from shira.cli import fuse as command
from shira.fusing import METHODS, Method
from shira.support import align
from tests.adapters import delta


def largest_of_all(deltas, weights, epsilon):
    """A method as somebody else would write it, with an option of `fuse`."""
    union, places = align([part.support for part in deltas])
    total = torch.full((union.nnz,), epsilon)
    for part, weight, place in zip(deltas, weights, places, strict=True):
        total[place] = torch.maximum(total[place], part.values * weight)
    return SparseDelta(union, total)


def test_a_row_makes_a_method(monkeypatch):
    monkeypatch.setitem(METHODS, "largest", Method(largest_of_all, density=0.9))
    a = Adapter({"w": delta((2, 3), {0: 1.0, 4: -5.0})})
    b = Adapter({"w": delta((2, 3), {0: 3.0, 5: 2.0})})
    fused = fuse([a, b], [1.0, 2.0], "largest", epsilon=0.125)
    assert fused["w"] == delta((2, 3), {0: 6.0, 4: 0.125, 5: 4.0})
    assert fused.metadata["fused"]["epsilon"] == 0.125


def test_options_are_those_that_the_functions_name():
    expected = {
        "sum": (),
        "mean": (),
        "ties": ("density", "majority_sign_method"),
        "dare": ("density", "seed"),
        "dare_ties": ("density", "seed", "majority_sign_method"),
        "della": ("density", "epsilon", "seed", "majority_sign_method"),
        "magnitude": ("density", "k"),
        "magnitude_prune": ("density",),
    }
    assert {name: METHODS[name].options for name in expected} == expected


def test_the_command_and_the_docstring_name_the_same_methods():
    listed = str(command.command.__annotations__["method"])
    names = re.search("(sum, .*) or (magnitude_prune)", listed)
    assert names is not None
    for name in [*names[1].split(", "), names[2]]:
        assert name in METHODS
        assert f"\n    {name}:" in command.command.__doc__ or f" {name}:" in command.command.__doc__
        assert f"``{name}``" in fuse.__doc__
