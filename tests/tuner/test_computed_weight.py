# SPDX-License-Identifier: Apache-2.0
"""Weights that are computed from other parameters: adapted, trained, never merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn.utils import prune

from shira import Switch
from shira.errors import AdapterError, MergeError, TargetError

from .merged import adapted, assert_equal, shira_layers
from .models import randomize
from .test_own_forward import Scaled

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def old(name):
    def compute(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(torch.nn.utils, name)(layer)

    return compute


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "older weight_norm": old("weight_norm"),
    "older spectral_norm": old("spectral_norm"),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


class Net(nn.Module):
    def __init__(self, compute) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.computed = compute(nn.Linear(8, 8))

    def forward(self, x):
        return self.computed(torch.tanh(self.first(x)))


def net(kind):
    torch.manual_seed(0)
    return Net(KINDS[kind]).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_several_are_not_taken_for_one_tied_weight(kind):
    torch.manual_seed(0)
    base = nn.ModuleDict({name: KINDS[kind](nn.Linear(64, 64)) for name in "abcd"})
    assert len(shira_layers(adapted(base, list("abcd")))) == 4


@pytest.mark.filterwarnings("ignore:One of the base layers:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind):
    """As a plain layer with the weight as computed: in value, in gradient, in both modes."""
    base = net(kind)
    before = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        want = base(X)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        plain[0].load_state_dict(base.first.state_dict())
        plain[2].weight.copy_(base.computed.weight)
        plain[2].bias.copy_(base.computed.bias)
    model = adapted(base, ["computed"])
    assert_equal(model(X), want)
    other = adapted(plain, ["2"])
    layer, like = shira_layers(model)["computed"], shira_layers(other)["2"]
    values = torch.randn(layer.shira_weight["default"].shape)
    for one in (layer, like):
        one.shira_indices["default"] = layer.shira_indices["default"]
        one.shira_weight["default"].data = values.clone()
    assert_equal(model(X), other(X))
    for one in (model, other):
        one(X).square().sum().backward()
    assert torch.equal(layer.shira_weight["default"].grad, like.shira_weight["default"].grad)
    if "spectral" not in kind:  # see below
        assert_equal(model.train()(X), other(X))
        model.eval()
    with model.disable_adapter():
        assert_equal(model(X), want)
    unloaded = model.unload()
    assert_equal(unloaded(X), want)
    after = unloaded.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_weight_that_is_another_at_each_call():
    """spectral_norm in training: adapted or not, the estimate gets better at each call, once."""
    make = parametrizations.spectral_norm
    for layer, x in [(nn.Linear(8, 8), X), (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 5, 5))]:
        base = nn.Sequential(make(layer)).train()
        like = copy.deepcopy(base)
        model = adapted(base, "0")
        for _ in range(2):
            assert_equal(model(x), like(x))
        unloaded = model.unload().state_dict()
        assert all(torch.equal(unloaded[name], value) for name, value in like.state_dict().items())


@pytest.mark.filterwarnings("ignore:One of the base layers:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_before_anything_is_merged(kind):
    model = adapted(net(kind), ["first", "computed"])
    randomize(model)
    want = model(X)
    first = model.base_model.model.first
    weight = first.get_base_layer().weight.clone()
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        shira_layers(model)["computed"].merge,
    ):
        with pytest.raises(MergeError, match=r"computed\.weight: .*computed from other parameters"):
            merge()
    assert torch.equal(first.get_base_layer().weight, weight)
    assert not first.merged
    assert_equal(model(X), want)


@pytest.mark.parametrize("kind", ["weight_norm", "pruned"])
def test_a_switch_refuses_it_too(kind):
    from shira import Adapter

    model = adapted(net(kind), ["computed"])
    switch = Switch(net(kind))
    with pytest.raises(AdapterError, match=r"computed\.weight"):
        switch.load("a", Adapter.from_model(model))


@pytest.mark.filterwarnings("ignore:One of the base layers:UserWarning")
def test_with_the_parametrization_removed_it_merges():
    base = net("pruned")
    model = adapted(base, ["computed"])
    randomize(model)
    want = model(X)
    prune.remove(shira_layers(model)["computed"].get_base_layer(), "weight")
    assert_equal(model.merge_and_unload()(X), want)


def test_with_a_forward_of_its_own_it_is_refused():
    base = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(Scaled(8, 8)))
    plain = base[0]
    with pytest.raises(TargetError, match=r"1: its weight is computed"):
        adapted(base, ["0", "1"])
    assert base[0] is plain
