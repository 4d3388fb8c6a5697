# SPDX-License-Identifier: Apache-2.0
"""The check of the sweep finds what is wrong."""

from __future__ import annotations

import copy
import os
import time

import pytest
import torch
from torch import nn

from shira.tuner.layers import Linear
from tests.sweep import checking, workers


def found(model: nn.Module) -> checking.Finding:
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    before = checking.Reference(checking.steady(model), lambda model: model(x))
    assert not before.why
    return checking.check(copy.deepcopy(model), before, ["0"])


def test_a_model_that_is_right():
    assert found(nn.Sequential(nn.Linear(8, 8), nn.ReLU())) == ("right", 1, "")


def test_an_adapter_without_effect(monkeypatch):
    def product(self, deltas, indices, x):
        return self.get_base_layer()(x)

    monkeypatch.setattr(Linear, "_product", product)
    verdict, _, detail = found(nn.Sequential(nn.Linear(8, 8)))
    assert verdict == "WRONG"
    assert detail.startswith("filled, eval without gradients: off by")


def test_an_adapter_with_a_wrong_gradient(monkeypatch):
    right = Linear._product

    def product(self, deltas, indices, x):
        return right(self, [2 * d - d.detach() for d in deltas], indices, x)

    monkeypatch.setattr(Linear, "_product", product)
    verdict, _, detail = found(nn.Sequential(nn.Linear(8, 8)))
    assert (verdict, detail) == ("WRONG", "wrong gradient: 0 off by 1.0e+00")


def test_a_base_that_is_not_put_back(monkeypatch):
    right = Linear.unmerge

    def unmerge(self):
        right(self)
        with torch.no_grad():
            self.get_base_layer().weight[0, 0] += 1

    monkeypatch.setattr(Linear, "unmerge", unmerge)
    verdict, _, detail = found(nn.Sequential(nn.Linear(8, 8)))
    assert (verdict, detail) == ("WRONG", "after unmerge: 0.weight has changed")


def test_a_layer_that_is_refused():
    verdict, layers, detail = found(nn.Sequential(nn.LayerNorm(8)))
    assert (verdict, layers) == ("refused", 0)
    assert "LayerNorm" in detail


def work(name: str) -> str | dict:
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        os._exit(3)
    return {"name": name}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_class_that_hangs_or_dies_stops_no_other(jobs):
    results = dict(workers.each(work, ["a", "hangs", "b", "dies", "c"], 1.0, jobs))
    assert results == {
        "a": {"name": "a"},
        "hangs": "more than 1 s",
        "b": {"name": "b"},
        "dies": "its process ended with 3",
        "c": {"name": "c"},
    }
