# SPDX-License-Identifier: Apache-2.0
"""Models that are moved, cast, offloaded or rebuilt while adapters are merged into them."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from shira import ShiraConfig, get_peft_model
from shira.errors import MergeError
from shira.tuner.layer import ShiraLayer

from .experts import mixture
from .models import EVERYTHING, base_weights, everything, llama, mlp, randomize, same_weights

TARGETS = {
    everything: {"target_modules": EVERYTHING},
    mixture: {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    mlp: {"target_modules": ["lin1", "lin2"]},
}


def adapted(build, **options):
    model = get_peft_model(build(), ShiraConfig(r=1, random_seed=1, **TARGETS[build], **options))
    randomize(model)
    return model


MOVES = {
    "half and back": lambda model: model.half().float(),
    "bfloat16, to float64": lambda model: model.bfloat16().double(),
    "another device": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("build", [everything, mixture])
def test_the_originals_move_with_what_is_merged(build, kind):
    """The entries are rounded as the rest of the base is: as a base that was never merged."""
    model, plain = adapted(build), adapted(build)
    model.merge_adapter()
    assert not same_weights(base_weights(model), base_weights(plain))
    MOVES[kind](model)
    model.unmerge_adapter()
    got, want = base_weights(model), base_weights(MOVES[kind](plain))
    if kind == "another device":
        assert {tensor.device.type for tensor in got.values()} == {"meta"}
    else:
        assert same_weights(got, want)
    assert not any(m.merged for m in model.modules() if isinstance(m, ShiraLayer))


def computed(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)


def smaller(layer):
    layer.weight = nn.Parameter(torch.zeros(2, 3))


@pytest.mark.parametrize("change", [computed, smaller])
def test_another_weight_in_the_place_of_the_merged_one_is_left_alone(change):
    model = adapted(mlp)
    model.add_adapter("second", ShiraConfig(r=1, random_seed=2, **TARGETS[mlp]))
    model.merge_adapter(["default"])
    net = model.base_model.model
    change(net.lin2.base_layer)
    before = base_weights(model)
    for act in (
        model.unmerge_adapter,
        net.lin2.unmerge,
        lambda: net.lin2.set_scale("default", 2.0),
        lambda: net.lin2.merge_only([]),
        lambda: net.lin2.delete_adapter("default"),
    ):
        with pytest.raises(MergeError, match=r"lin2.weight: .* cannot be taken out of the weight"):
            act()
    with pytest.raises(MergeError, match="cannot be"):
        net.lin2.merge(adapter_names=["second"])
    assert net.lin1.merged_adapters == net.lin2.merged_adapters == ["default"]
    assert net.lin2.scaling["default"] == 1.0
    assert same_weights(base_weights(model), before)


def test_what_is_merged_into_an_offloaded_weight_comes_out_of_it():
    """There, not in the placeholder that the layer has between two calls."""
    config = ShiraConfig(density=0.1, target_modules=["q_proj"], random_seed=0)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain, want = llama()(ids).logits, {}
        model = get_peft_model(llama(), config)
        randomize(model)
        layers = [m for m in model.modules() if isinstance(m, ShiraLayer)]
        for scale in (1.0, 2.0):
            for layer in layers:
                layer.set_scale("default", scale)
            want[scale] = model(ids).logits
        model = get_peft_model(cpu_offload(llama(), execution_device=torch.device("cpu")), config)
        randomize(model)
        layers = [m for m in model.modules() if isinstance(m, ShiraLayer)]
        model.merge_adapter()
        assert torch.equal(model(ids).logits, want[1.0])
        for layer in layers:
            layer.set_scale("default", 2.0)
        assert torch.equal(model(ids).logits, want[2.0])
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
        assert not any(layer.merged for layer in layers)
        layers[0].merge()
        assert layers[0].base_layer.weight.is_meta
        layers[0].unmerge()
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)
