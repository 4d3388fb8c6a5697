# SPDX-License-Identifier: Apache-2.0
"""From LoRA: the product by rows, its energy, PEFT's files of it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shira.base import fingerprint
from shira.convert import Factors, from_lora, is_lora
from shira.convert import lora as lora_module
from shira.errors import AdapterError, FileFormatError, WrongBaseError


@st.composite
def factors(draw):
    r, out, inner = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((r, inner), (out, r)))
    return Factors("w", a, b, draw(st.sampled_from([1.0, 0.25])), draw(st.booleans()))


def dense(one: Factors) -> torch.Tensor:
    update = one.b.double() @ one.a.double() * one.scaling
    return update.t() if one.transposed else update


@settings(max_examples=120, deadline=None)
@given(factors(), st.floats(0.01, 1), st.sampled_from([5, 10**6]))
def test_as_the_dense_product(one, density, block):
    whole = dense(one).reshape(-1)
    lora_module.BLOCK, before = block, lora_module.BLOCK
    try:
        found = from_lora([one], density=density)
    finally:
        lora_module.BLOCK = before
    delta, (kept,) = found.adapter["w"], found.weights
    k = max(1, round(density * whole.numel()))
    chosen = delta.support.indices.long()
    assert kept.kept == delta.nnz == k
    torch.testing.assert_close(delta.values.double(), whole[chosen], rtol=1e-4, atol=1e-6)
    limit = whole.abs().sort(descending=True).values[k - 1]
    assert (whole[chosen].abs() >= limit * (1 - 1e-4) - 1e-6).all()
    assert kept.energy == pytest.approx(whole.square().sum().item(), rel=1e-3, abs=1e-9)
    assert found.energy_share == pytest.approx(
        (whole[chosen].square().sum() / whole.square().sum()).item(), rel=1e-3
    )


def test_never_whole(monkeypatch):
    monkeypatch.setattr(lora_module, "BLOCK", 1000)
    one = Factors("w", torch.randn(2, 300), torch.randn(200, 2))
    sizes = [block.numel() for block in lora_module.update_blocks(one)]
    assert max(sizes) <= 1000
    assert sum(sizes) == 60_000


def test_without_a_budget_as_many_entries_as_the_lora_has():
    found = from_lora([Factors("w", torch.randn(2, 30), torch.randn(20, 2))])
    assert found.adapter.nnz == 2 * (30 + 20)


def test_the_largest_of_all_weights():
    torch.manual_seed(0)
    large = Factors("large", torch.randn(2, 8), torch.randn(8, 2), scaling=10.0)
    small = Factors("small", torch.randn(2, 8), torch.randn(8, 2), scaling=0.001)
    found = from_lora([large, small], density=0.25, everywhere=True)
    assert {name: delta.nnz for name, delta in found.adapter.items()} == {"large": 32}
    assert found.weights[1].kept == 0


def test_a_lora_that_was_not_trained_holds_nothing():
    found = from_lora([Factors("w", torch.randn(2, 8), torch.zeros(8, 2))])
    assert (len(found.adapter), found.energy_share) == (0, 1.0)


def test_factors_that_do_not_fit():
    with pytest.raises(AdapterError, match=r"not \(r, in\) and \(out, r\)"):
        Factors("w", torch.ones(2, 8), torch.ones(8, 3))
    with pytest.raises(AdapterError, match="not floats"):
        Factors("w", torch.ones(2, 8).int(), torch.ones(8, 2))
    one = Factors("w", torch.ones(2, 8), torch.ones(8, 2))
    with pytest.raises(AdapterError, match="two LoRAs of one weight"):
        from_lora([one, one])
    with pytest.raises(AdapterError, match=r"'w': .*NaN"):
        from_lora([Factors("w", torch.full((2, 8), torch.nan), torch.ones(8, 2))])
    with pytest.raises(WrongBaseError, match=r"has shape \(8, 9\)"):
        from_lora([one], base={"w": torch.ones(8, 9)})


# PEFT's files, against PEFT's own merge


def peft_lora(folder, kind, **options):
    """A trained LoRA of a tiny model; the base, and what PEFT adds to each of its weights."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        )
    else:
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    merged = model.merge_and_unload()
    return weights, {
        n: p.detach() - weights[n] for n, p in merged.named_parameters() if n in weights
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "k_proj", "down_proj"],
                "rank_pattern": {"layers.0.self_attn.q_proj": 4, "down_proj": 3},
                "alpha_pattern": {r".*\.1\..*k_proj": 7},
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),  # c_proj is square in one of two
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*tie", "ignore:Model has")
def test_all_entries_are_what_peft_merges(tmp_path, kind, options):
    weights, updates = peft_lora(tmp_path, kind, **options)
    assert is_lora(tmp_path)
    found = from_lora(tmp_path, base=weights, density=1.0)
    changed = {name for name, update in updates.items() if update.any()}
    if "lm_head.weight" not in found.adapter:  # tied to the embedding, listed under one name
        changed.discard("lm_head.weight")
    assert found.adapter.keys() == changed
    for name, delta in found.adapter.items():
        assert delta.support.shape == tuple(weights[name].shape)
        expected = updates[name].reshape(-1)[delta.support.indices.long()]
        torch.testing.assert_close(delta.values, expected, rtol=1e-4, atol=1e-5)
    prints = found.adapter.metadata["base_fingerprint"]
    for name, delta in found.adapter.items():
        held = weights[name].reshape(-1)[delta.support.indices.long()]
        assert prints[name] == fingerprint(held)
    assert found.energy_share == pytest.approx(1.0)


@pytest.fixture
def saved(tmp_path):
    """A LoRA as PEFT writes it, made by hand."""
    torch.manual_seed(0)
    key = "base_model.model.layer"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(2, 6),
        f"{key}.lora_B.weight": torch.randn(4, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "some/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_without_the_base(saved):
    found = from_lora(saved, density=0.5)
    assert found.adapter["layer.weight"].support.shape == (4, 6)
    assert found.adapter.metadata == {"base_model_name_or_path": "some/model"}
    change_config(saved, fan_in_fan_out=True)
    assert from_lora(saved).adapter["layer.weight"].support.shape == (6, 4)


def test_the_base_has_another_prefix_or_is_another(saved):
    weight = torch.zeros(4, 6)
    found = from_lora(saved, base={"model.layer.weight": weight})
    assert found.adapter.keys() == {"layer.weight"}
    with pytest.raises(WrongBaseError, match=r"no 'layer.weight'.*Did you mean 'layers.weight'"):
        from_lora(saved, base={"layers.weight": weight})
    with pytest.raises(WrongBaseError, match=r"has shape \(4, 7\)"):
        from_lora(saved, base={"layer.weight": torch.zeros(4, 7)})


def test_saved_modules_are_carried(saved):
    head = torch.arange(2.0)
    change_tensors(saved, lambda t: t.update({"base_model.model.score.weight": head}))
    found = from_lora(saved)
    assert list(found.adapter.tensors) == ["score.weight"]
    assert torch.equal(found.adapter.tensors["score.weight"], head)
    assert found.as_json()["whole_tensors"] == ["score.weight"]


@pytest.mark.parametrize(
    "name", ["embed.token_adapter.trainable_tokens_delta", "x.ia3_l.weight", "y.shira_weight"]
)
def test_tensors_of_other_methods_are_refused_by_name(saved, name):
    change_tensors(saved, lambda t: t.update({name: torch.ones(2)}))
    with pytest.raises(FileFormatError, match=f"{name}.*no tensor of a base model"):
        from_lora(saved)


def test_a_copy_of_an_adapted_weight_is_the_bases_or_refused(saved):
    weight = torch.randn(4, 6)
    key = "base_model.model.layer.base_layer.weight"
    change_tensors(saved, lambda t: t.update({key: weight}))
    for base in (weight, weight.bfloat16(), weight.double()):
        assert from_lora(saved, base={"layer.weight": base}).adapter.tensors == {}
    with pytest.raises(AdapterError, match=r"copy of 'layer.weight'.*the base another"):
        from_lora(saved, base={"layer.weight": weight + 1})
    with pytest.raises(AdapterError, match="no base is given"):
        from_lora(saved)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"use_dora": True}, AdapterError, r"DoRA \(use_dora\) is not supported"),
        ({"target_parameters": ["x"]}, AdapterError, "LoRA of parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, AdapterError, "changes the base's weights"),
        ({"peft_type": "SHIRA"}, FileFormatError, "not 'LORA'"),
        ({"r": 3}, FileFormatError, "not of the config's rank 3"),
        ({"r": "2"}, FileFormatError, "r is a number"),
        ({"alpha_pattern": {"(": 1}}, FileFormatError, "no regular expression"),
        ({"rank_pattern": []}, None, None),
        ({"rank_pattern": ["x"]}, FileFormatError, "maps patterns to numbers"),
    ],
)
def test_configs_that_are_refused(saved, fields, error, match):
    change_config(saved, **fields)
    if error is None:
        from_lora(saved)
        return
    with pytest.raises(error, match=match):
        from_lora(saved)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t, k: t.pop(f"{k}.lora_B.weight"), FileFormatError, "missing tensor"),
        (
            lambda t, k: t.update({f"{k}.lora_A.weight": torch.ones(2, 6, 3, 3)}),
            AdapterError,
            "LoRA of a convolution is not supported",
        ),
        (
            lambda t, k: t.update({f"{k}.lora_magnitude_vector.weight": torch.ones(4)}),
            AdapterError,
            "lora_magnitude_vector",
        ),
        (
            lambda t, k: t.update({f"{k}.lora_A.weight": torch.full((2, 6), torch.inf)}),
            FileFormatError,
            "not finite",
        ),
        (
            lambda t, k: t.update({f"{k}.lora_A.weight": torch.ones(2, 6).int()}),
            FileFormatError,
            "not a float",
        ),
        (lambda t, k: (t.clear(), t.update(x=torch.ones(1))), FileFormatError, "not a LoRA"),
    ],
)
def test_tensors_that_are_refused(saved, change, error, match):
    change_tensors(saved, lambda tensors: change(tensors, "base_model.model.layer"))
    with pytest.raises(error, match=match):
        from_lora(saved)


def test_square_weights_that_do_not_tell_their_orientation():
    from shira.convert.lora_file import oriented

    def one(name, out, inner):
        return Factors(name, torch.ones(2, inner), torch.ones(out, 2))

    three = [one("a", 4, 6), one("b", 4, 6), one("square", 5, 5)]
    turned = oriented(three, {"a": (6, 4), "b": (6, 4), "square": (5, 5)}, "lora")
    assert [f.transposed for f in turned] == [True, True, True]
    same = oriented(three, {"a": (4, 6), "b": (4, 6), "square": (5, 5)}, "lora")
    assert [f.transposed for f in same] == [False, False, False]
    with pytest.raises(AdapterError, match="'square' does not tell"):
        oriented(three, {"a": (6, 4), "b": (4, 6), "square": (5, 5)}, "lora")
