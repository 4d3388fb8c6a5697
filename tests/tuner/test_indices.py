# SPDX-License-Identifier: Apache-2.0
"""A layer keeps its positions in a byte each, and shows them as PEFT has them."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from shira import ShiraConfig, get_peft_model
from shira.ops import native, plan_for

needs_kernels = pytest.mark.skipif(native.load().library is None, reason="packed for the kernels")
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
KEY = "base_model.model.0.shira_indices.default"


def adapted(r=2, seed=3):
    torch.manual_seed(0)
    config = ShiraConfig(r=r, target_modules=["0"], random_seed=seed, init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(64, 80)), config)


def layer_of(model):
    return model.base_model.model[0]


def buffer_of(model):
    return dict(model.named_buffers())[KEY]


@needs_kernels
def test_packed_from_the_first_forward_on_and_seen_as_rows_and_columns():
    model = adapted()
    want = layer_of(model).shira_indices["default"]
    assert buffer_of(model) is want
    assert want.shape == (2, 288)
    model(X)
    assert buffer_of(model).dtype == torch.uint8
    assert buffer_of(model).nbytes < want.nbytes / 7
    indices = layer_of(model).shira_indices
    for seen in (indices["default"], *indices.values(), dict(indices.items())["default"]):
        assert seen.dtype == torch.int32
        assert torch.equal(seen, want)
    assert torch.equal(model.state_dict()[KEY], want)
    assert torch.equal(layer_of(model).support("default").coordinates(), want)
    assert list(indices) == ["default"]


@needs_kernels
def test_few_positions_of_a_large_weight_are_left_alone():
    config = ShiraConfig(r=1, target_modules=["0"], random_seed=3)
    model = get_peft_model(nn.Sequential(nn.Linear(500, 500)), config)
    model(torch.randn(2, 500))
    assert layer_of(model).shira_indices["default"].shape == (2, 1000)
    assert buffer_of(model).dtype == torch.int32


@needs_kernels
def test_nothing_changes_in_what_is_computed(monkeypatch):
    def step():
        model = adapted()
        y = model(X)
        y.square().sum().backward()
        return buffer_of(model).dtype, y, layer_of(model).shira_weight["default"].grad

    packed = step()
    monkeypatch.setattr("shira.tuner.indices.pack", lambda coordinates, shape: coordinates)
    plain = step()
    assert (packed[0], plain[0]) == (torch.uint8, torch.int32)
    assert torch.equal(packed[1], plain[1])
    assert torch.equal(packed[2], plain[2])


def test_loading_other_positions_after_a_forward():
    model, other = adapted(seed=3), adapted(seed=4)
    model(X)
    want = other(X)
    kept = layer_of(model).shira_indices.kept("default")
    model.load_state_dict(model.state_dict())
    assert layer_of(model).shira_indices.kept("default") is kept  # nothing new: plans stay
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), want)
    model.load_state_dict(adapted(seed=5).state_dict(), assign=True)
    assert torch.equal(model(X), adapted(seed=5)(X))
    narrow = {key: t.to(torch.int16) if key == KEY else t for key, t in other.state_dict().items()}
    model.load_state_dict(narrow, assign=True)
    assert torch.equal(model(X), want)
    wrong = {**other.state_dict(), KEY: torch.zeros(2, 7, dtype=torch.int32)}
    before = layer_of(model).shira_indices["default"]
    with pytest.raises(RuntimeError, match=r"shape torch.Size\(\[2, 7\]\)"):
        model.load_state_dict(wrong)
    assert torch.equal(layer_of(model).shira_indices["default"], before)


def test_copies_and_casts_and_moves():
    model = adapted()
    want = layer_of(model).shira_indices["default"]
    y = model(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), y)
    for moved in (again.double(), again.half(), again.to("meta")):
        assert torch.equal(layer_of(moved).shira_indices["default"], want)


def test_merging_after_a_forward_is_exact():
    model = adapted()
    before = layer_of(model).base_layer.weight.clone()
    y = model(X)
    model.merge_adapter()
    assert torch.equal(model(X), y)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, before)


@needs_kernels
def test_the_plan_is_found_again():
    model = adapted()
    model(X)
    indices = layer_of(model).shira_indices
    plans = [plan_for([indices.kept("default")], (80, 64), (64, 1)) for _ in range(2)]
    assert plans[0] is plans[1]
    assert plans[0].kept is None


def test_compiled_first_and_called_after():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager", fullgraph=False)
        y = compiled(X)
    assert torch.equal(model(X), y)
    assert torch.equal(compiled(X), y)


def test_a_copy_keeps_positions_as_the_original_does():
    """Who copies buffers from one to the other afterwards finds them of one shape."""
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), ShiraConfig(r=2, target_modules=["0"]))
    copied = copy.deepcopy(model)
    model(torch.randn(2, 16))
    for one, other in zip(model.buffers(), copied.buffers(), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert one is not other
    assert copied.state_dict().keys() == model.state_dict().keys()
