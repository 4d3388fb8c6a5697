# SPDX-License-Identifier: Apache-2.0
"""Targets that are left out or cannot be adapted are named, with the remedy."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from shira import ShiraConfig, calibrate, get_peft_model
from shira.errors import MaskError, TargetError

from .models import everything, gpt2, llama, t5

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def mixture():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=8, shared_expert_intermediate_size=16, num_experts=4
        )
    )


def all_linear(**options):
    return ShiraConfig(
        **{"density": 0.1, "target_modules": "all-linear", "random_seed": 1, **options}
    )


def told(model, config):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, config)
    return adapted, [str(w.message) for w in caught if "all-linear" in str(w.message)]


def share_of_experts(model, adapted):
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts." in name)
    layers = [m for m in adapted.modules() if hasattr(m, "shira_weight")]
    modules = [m for m in layers if m.parameter_name == "weight"]
    return experts / (experts + sum(m.get_base_layer().weight.numel() for m in modules))


def test_routed_experts_are_linear_layers_where_loras_are():
    model = mixture()
    ours, messages = told(model, all_linear())
    share = share_of_experts(mixture(), ours)
    experts = "model.layers.*.mlp.experts"
    assert len(messages) == 1
    assert (
        f"includes the routed experts, {experts}.down_proj, {experts}.gate_up_proj:"
        f" {share:.0%} of" in messages[0]
    )
    assert ours.peft_config["default"].target_parameters == ["down_proj", "gate_up_proj"]
    from .experts import mixture as of_qwen3

    lora = get_peft_model(of_qwen3(), LoraConfig(r=2, target_modules="all-linear"))
    taken = {*lora.peft_config["default"].target_parameters} - {"gate.weight"}  # the router
    assert taken == {"down_proj", "gate_up_proj"}
    with pytest.warns(UserWarning, match="all-linear.*experts"):
        ours.add_adapter("other", all_linear())
    assert ours.peft_config["other"].target_parameters == ["down_proj", "gate_up_proj"]


def test_experts_that_are_left_out_are_named_with_their_share():
    ours, messages = told(mixture(), all_linear(exclude_modules=["experts"]))
    share = share_of_experts(mixture(), ours)
    experts = "model.layers.*.mlp.experts"
    assert ours.peft_config["default"].target_parameters is None
    assert messages[0].startswith(
        f"target_modules='all-linear' leaves out {experts}.down_proj, {experts}.gate_up_proj: "
        f"{share:.0%} of"
    )
    ours, messages = told(mixture(), all_linear(exclude_modules=r".*layers\.0\.mlp\.experts"))
    names = ours.peft_config["default"].target_parameters
    assert names == [f"model.layers.1.mlp.experts.{part}" for part in ("down_proj", "gate_up_proj")]
    assert len(messages) == 2
    _, (message,) = told(mixture(), all_linear(target_parameters=["experts.down_proj"]))
    assert f"leaves out {experts}.gate_up_proj:" in message


def test_calibration_says_so_too():
    ids = torch.arange(6)[None]
    with pytest.warns(UserWarning, match="all-linear.*experts"):
        calibrate(mixture(), all_linear(mask_type="grad"), [{"input_ids": ids, "labels": ids}])


class Odd(nn.Module):
    """Parameters of three dimensions that are no stack of matrices, and ones that are."""

    def __init__(self):
        super().__init__()
        self.conv, self.lin = weight_norm(nn.Conv1d(4, 4, 3)), nn.Linear(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("make", [llama, gpt2, t5, everything, Odd])
def test_models_without_experts_are_left_in_peace(make):
    assert told(make(), all_linear())[1] == []


def test_targets_by_name_are_no_promise_of_all():
    assert told(mixture(), all_linear(target_modules=["q_proj"]))[1] == []


def test_a_gate_of_one_row():
    model = mixture()
    before = dict(model.named_modules())
    want = (
        "model.layers.0.mlp.shared_expert_gate.weight: r=1 asks for r * (m + n) = 17 entries of a "
        "1 x 16 weight, which has 16; no r fits; give a density instead, or leave the layer out: "
        "exclude_modules=['shared_expert_gate']"
    )
    with pytest.raises(MaskError, match=re.escape(want)):
        get_peft_model(model, all_linear(density=None, r=1))
    assert dict(model.named_modules()) == before
    get_peft_model(model, all_linear(density=None, r=1, exclude_modules=["shared_expert_gate"]))
    get_peft_model(mixture(), all_linear())


def test_a_rank_that_is_too_large_for_one_layer():
    config = ShiraConfig(r=8, target_modules=["q_proj", "k_proj"], random_seed=1)
    with pytest.raises(MaskError) as caught:
        get_peft_model(llama(), config)
    message = str(caught.value)
    assert "model.layers.0.self_attn.k_proj.weight: r=8" in message
    assert "a 8 x 16 weight" in message
    assert "the largest r that fits is 5" in message
    assert "rank_pattern={'k_proj': 5}" in message
    assert "exclude_modules=['k_proj']" in message
    assert "density" in message
    config = ShiraConfig(
        r=8, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}, random_seed=1
    )
    get_peft_model(llama(), config)


def test_a_layer_that_a_number_names():
    with pytest.raises(MaskError, match=r"exclude_modules=\['0\.1'\]"):
        get_peft_model(
            nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(8, 1))),
            ShiraConfig(r=1, target_modules=["0.1"], random_seed=1),
        )


@pytest.mark.parametrize("name", ["foo", "c_proj", "dt_proj", "w1", "query"])
def test_no_hint_at_what_is_not_near(name):
    with pytest.raises(TargetError) as caught:
        get_peft_model(llama(), ShiraConfig(r=1, target_modules=[name]))
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("oproj", "'o_proj'"), ("q_prj", "'q_proj'"), ("up_porj", "'up_proj'")]
)
def test_a_hint_at_what_is_near(name, hint):
    with pytest.raises(TargetError) as caught:
        get_peft_model(llama(), ShiraConfig(r=1, target_modules=[name]))
    assert f"Did you mean {hint}?" in str(caught.value)


def test_a_model_that_does_not_tell_its_embeddings():
    model = llama(tie_word_embeddings=True)

    def embeddings():
        raise NotImplementedError("not auto-handled")

    model.get_input_embeddings = model.model.get_input_embeddings = embeddings
    adapted = get_peft_model(model, ShiraConfig(r=1, target_modules=["q_proj"]))
    assert "q_proj" in "".join(adapted.targeted_module_names)


class InAList(nn.Module):
    """As MaskFormer's blocks keep their layers."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        for place, layer in enumerate(self.layers):
            self.add_module(str(place), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x))


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.__dict__["alias"] = self.first

    def forward(self, x):
        return self.alias(x)


@pytest.mark.parametrize(
    ("model", "target", "attribute"),
    [(InAList, "0", "layers"), (Twice, "first", "second"), (Hidden, "first", "alias")],
)
def test_a_layer_that_is_called_from_elsewhere_is_refused(model, target, attribute):
    model = nn.Sequential(model(), nn.Linear(8, 8))
    modules = dict(model.named_modules())
    with pytest.raises(TargetError, match=f"'0.{target}' is also held by 0 .*as '{attribute}'"):
        get_peft_model(model, ShiraConfig(r=1, target_modules=[f"0.{target}"]))
    assert dict(model.named_modules()) == modules
    adapted = get_peft_model(model, ShiraConfig(r=1, target_modules="1"))
    assert "1" in adapted.targeted_module_names


class TwoWays(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)

    def plain(self, ids):
        return super().forward(ids)


def test_a_model_that_rescales_its_weights_in_eval_mode_is_refused():
    from transformers import RwkvConfig, RwkvModel

    shape = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16}
    model = RwkvModel(RwkvConfig(**shape, context_length=8, rescale_every=1)).eval()
    config = ShiraConfig(r=1, target_modules="all-linear", random_seed=0)
    with pytest.raises(TargetError, match="rescale_every = 0"):
        get_peft_model(model, config)
    model.config.rescale_every = 0
    tokens = torch.arange(4)[None]
    before = model(tokens).last_hidden_state
    adapted = get_peft_model(model, config)
    assert torch.equal(adapted(tokens).last_hidden_state, before)


def test_a_layer_with_a_second_method_that_computes_is_refused():
    model = nn.Sequential(TwoWays(8, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"0: TwoWays computes in 'plain' too"):
        get_peft_model(model, ShiraConfig(r=1, target_modules=["0"]))
