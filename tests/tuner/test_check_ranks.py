# SPDX-License-Identifier: Apache-2.0
"""Positions compared between processes; on real processes in tests/distributed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from shira import ShiraConfig, get_peft_model
from shira.errors import RankMismatchError
from shira.tuner import check_ranks, indices

from .models import mlp, randomize

A, B, C = frozenset("a"), frozenset("b"), frozenset("c")
KEY, OTHER = ("default", "x.weight"), ("default", "y.weight")


def adapted(seed=0, name="default"):
    config = ShiraConfig(r=1, target_modules=["lin1", "lin2"], random_seed=seed)
    return get_peft_model(mlp(), config, adapter_name=name)


@pytest.mark.parametrize(
    "by_rank",
    [
        [{KEY: A}, {KEY: A}],
        [{KEY: A}, {OTHER: B}],  # stages of a pipeline
        [{KEY: A | B}, {KEY: A}],  # rank 0 holds a second model
        [{}, {KEY: A}],
    ],
)
def test_no_contradiction(by_rank):
    indices.raise_if_different(by_rank)


@pytest.mark.parametrize(
    ("by_rank", "who"),
    [
        ([{KEY: A}, {KEY: B}], "ranks 0 and 1"),
        ([{KEY: A}, {KEY: A}, {KEY: B}], "ranks 0 and 2"),
        ([{KEY: A | B}, {KEY: A | C}], "ranks 0 and 1"),
        ([{OTHER: A}, {KEY: A, OTHER: A}, {KEY: B}], "ranks 1 and 2"),
    ],
)
def test_contradictions_are_named(by_rank, who):
    with pytest.raises(RankMismatchError, match=rf"'default', parameter 'x.weight': {who}"):
        indices.raise_if_different(by_rank)


def layers(model):
    return indices._layers_of(model)


def test_digests_tell_positions_and_nothing_else():
    model, other = adapted(), adapted()
    randomize(other)
    same = indices.digests_of(layers(model))
    assert {name for _, name in same} == {"lin1.weight", "lin2.weight"}
    assert indices.digests_of(layers(other)) == same
    assert indices.digests_of(layers(adapted(seed=1))).keys() == same.keys()
    assert not set(indices.digests_of(layers(adapted(seed=1))).values()) & set(same.values())
    assert {adapter for adapter, _ in indices.digests_of(layers(adapted(name="b")))} == {"b"}


@pytest.fixture
def checks(monkeypatch):
    """Pretends two ranks; the list of what would be compared."""
    compared = []
    indices.new_models.clear()
    monkeypatch.setattr(indices, "_several_ranks", lambda: True)
    monkeypatch.setattr(indices, "compare", lambda digests, group: compared.append(digests))
    return compared


def test_checked_once_at_the_first_training_forward(checks):
    model = adapted()
    x = torch.randn(2, 8)
    with torch.no_grad():
        model(x)
    with model.disable_adapter():
        model(x)
    assert not checks
    model(x)
    model(x)
    assert [len(digests) for digests in checks] == [2]
    model.add_adapter("second", ShiraConfig(r=1, target_modules=["lin1"], random_seed=3))
    model.set_adapter("second")
    model(x)
    assert len(checks) == 2
    assert ("second", "lin1.weight") in checks[1]


def test_a_frozen_adapter_is_nobodys_training(checks):
    model = adapted()
    model.requires_grad_(False)
    model(torch.randn(2, 8, requires_grad=True))
    assert not checks


def test_a_copy_is_checked_layer_by_layer(checks):
    original = adapted()
    model = copy.deepcopy(original)
    del original
    gc.collect()
    model(torch.randn(2, 8))
    model(torch.randn(2, 8))
    assert [list(digests) for digests in checks] == [
        [("default", "lin1.weight")],
        [("default", "lin2.weight")],
    ]


def test_a_compiled_model_is_checked_while_it_is_traced(checks):
    import torch._dynamo

    torch._dynamo.reset()
    model = adapted()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    compiled(torch.randn(2, 8))
    compiled(torch.randn(2, 8))
    assert [len(digests) for digests in checks] == [2]


def test_the_check_can_be_turned_off_and_made_by_hand(checks, monkeypatch):
    monkeypatch.setenv(indices.SWITCH, "0")
    model = adapted()
    model(torch.randn(2, 8))
    assert not checks
    check_ranks(model)
    assert len(checks) == 1


def test_what_ddp_ignores():
    model = adapted()
    base = model.get_base_model()
    want = [f"{name}.shira_indices.default" for name in ("lin1", "lin2")]
    assert base._ddp_params_and_buffers_to_ignore == want
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers <= set(model._ddp_params_and_buffers_to_ignore)
    model.unload()
    assert "_ddp_params_and_buffers_to_ignore" not in base.__dict__


def test_what_others_have_ddp_ignore_stays():
    base = mlp()
    base._ddp_params_and_buffers_to_ignore = ["lin0.weight"]
    config = ShiraConfig(r=1, target_modules=["lin1"])
    model = get_peft_model(base, config)
    assert "base_model.model.lin0.weight" in model._ddp_params_and_buffers_to_ignore
    model.unload()
    assert base._ddp_params_and_buffers_to_ignore == ["lin0.weight"]


def test_the_former_place_of_the_name():
    from shira.tuner.ranks import check_ranks as former

    assert former is check_ranks
