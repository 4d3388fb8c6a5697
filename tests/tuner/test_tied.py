# SPDX-License-Identifier: Apache-2.0
"""Tied weights and rows of tokens: adapted once, seen by every user of the weight, exact."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from peft import PeftMixedModel, TrainableTokensConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from shira import Adapter, PeftModel, ShiraConfig, Switch, calibrate, get_peft_model
from shira.convert import merge
from shira.errors import ConfigError, FileFormatError, MergeError, TargetError, WrongBaseError

from .models import base_weights, gpt2, llama, opt, randomize, same_weights
from .quantizers import QUANTIZERS, patched

IDS = torch.arange(20).view(2, 10) % 13
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


def tied_llama():
    return llama(tie_word_embeddings=True)


def tied_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config).eval()


def call(model, **more):
    inputs = {"decoder_input_ids": IDS} if "t5" in model.config.model_type else {}
    return model(input_ids=IDS, **inputs, **more)


def logits(model):
    with torch.no_grad():
        return call(model).logits


def adapted(base, seed=1, **options):
    options = {"target_modules": ["q_proj"], "r": 2, "random_seed": 0} | options
    model = get_peft_model(base, ShiraConfig(**options))
    randomize(model, seed)
    return model.eval()


def tied_layers(model):
    return [m for m in model.modules() if getattr(m, "tied_to", None) is not None]


TIED = {
    "tokens": (tied_llama, {"trainable_token_indices": [3, 60, 5]}),
    "tokens of a name": (tied_llama, {"trainable_token_indices": {"embed_tokens": [3, 60]}}),
    "tokens of both": (
        tied_llama,
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
    ),
    "tokens alone": (tied_llama, {"target_modules": [], "trainable_token_indices": [3]}),
    "embedding": (tied_llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "head": (tied_llama, {"target_modules": ["lm_head", "k_proj"], "ensure_weight_tying": True}),
    "both": (
        tied_llama,
        {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "expression": (tied_llama, {"target_modules": ".*(head|q_proj)", "ensure_weight_tying": True}),
    "entries and tokens": (
        tied_llama,
        {
            "target_modules": ["embed_tokens"],
            "ensure_weight_tying": True,
            "trainable_token_indices": [7],
        },
    ),
    "GPT-2": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]}),
    "OPT": (opt, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "T5": (tied_t5, {"target_modules": ["q", "shared"], "ensure_weight_tying": True}),
    "T5, tokens": (tied_t5, {"target_modules": ["q"], "trainable_token_indices": [0, 9]}),
}


@pytest.mark.parametrize("name", TIED)
def test_one_weight_everywhere(name, tmp_path):
    """Switched, merged, saved and loaded in each way: the same bits, the base untouched."""
    make, options = TIED[name]
    base = make()
    model = adapted(base, **options)
    before, plain = base_weights(model), logits(make())
    assert len(tied_layers(model)) == (3 if "T5" in name else 1)
    y = logits(model)
    assert not torch.equal(y, plain)

    adapter = Adapter.from_model(model)
    model.save_pretrained(tmp_path / "peft")
    adapter.save(tmp_path / "compact")
    adapter.save(tmp_path / "again", "peft")
    loaded = [Adapter.load(tmp_path / kind) for kind in ("peft", "compact", "again")]
    assert all(one == adapter for one in loaded)
    for kind in ("peft", "again"):
        back = PeftModel.from_pretrained(make(), tmp_path / kind).eval()
        assert torch.equal(logits(back), y)
        assert len(tied_layers(back)) == len(tied_layers(model))

    other = make()
    switch = Switch(other)
    switch.load("a", loaded[0])
    for _ in range(3):
        switch.activate("a")
        assert torch.equal(logits(other), y)
        switch.deactivate()
        assert torch.equal(logits(other), plain)

    make().save_pretrained(tmp_path / "base")
    merge(tmp_path / "compact", tmp_path / "base", tmp_path / "merged", undo=tmp_path / "undo")
    kind = AutoModelForSeq2SeqLM if "T5" in name else AutoModelForCausalLM
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "merged")), y)

    model.merge_adapter()
    assert torch.equal(logits(model), y)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert same_weights(before, base_weights(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(whole), y)
    embedding = whole.get_input_embeddings().weight
    assert whole.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert torch.equal(logits(model.unload()), plain)


@pytest.mark.parametrize("name", ["tokens", "entries and tokens", "T5"])
def test_gradients_are_those_of_the_one_weight(name):
    """Values are trained as the entries of the dense weight are, by the sum over its users."""
    make, options = TIED[name]
    model = adapted(make(), **options)
    labels = {"labels": IDS}
    loss = call(model, **labels).loss
    loss.backward()
    whole = adapted(make(), **options).merge_and_unload()
    whole.requires_grad_(True)
    dense = call(whole, **labels).loss
    dense.backward()
    torch.testing.assert_close(loss, dense, rtol=0, atol=0)
    layer = model.get_input_embeddings()
    layer = layer.tied_to or layer
    gradient = whole.get_input_embeddings().weight.grad.view(-1)
    at = layer.support("default").indices.long()
    torch.testing.assert_close(layer.shira_weight["default"].grad, gradient[at])


def test_tokens_are_trained_as_peft_trains_them():
    """Rows after some steps, and that nothing else moves, against PEFT's own layer for tokens."""
    tokens, found = [1, 4, 40], []
    ours = ShiraConfig(target_modules=[], trainable_token_indices=tokens)
    stock = TrainableTokensConfig(token_indices=tokens, target_modules=["embed_tokens"])
    for config in (ours, stock):
        model = get_peft_model(tied_llama(), config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(5):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model.merge_and_unload().get_input_embeddings().weight.detach())
    base = tied_llama().get_input_embeddings().weight.detach()
    torch.testing.assert_close(found[0], found[1])
    moved = (found[0] != base).any(1).nonzero().flatten().tolist()
    assert moved == tokens


def test_what_is_trained_is_there_once():
    model = adapted(tied_llama(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    layer, (tied,) = model.get_input_embeddings(), tied_layers(model)
    assert model.get_output_embeddings() is tied
    assert tied.tied_to is layer
    (trained,) = [p for p in model.parameters() if p.requires_grad]
    assert trained is layer.shira_weight["default"]
    state = model.state_dict()
    assert not any("lm_head.shira" in name for name in state)
    model.load_state_dict(state)
    config = model.peft_config["default"].to_dict()
    assert config["tied_weights"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [*config["shira_shapes"]] == ["model.embed_tokens.weight"]
    alone = adapted(tied_llama(), trainable_token_indices=[3], r=2).peft_config["default"]
    assert alone.r == 2
    assert alone.to_dict()["trainable_token_indices"] == [3]


def test_a_model_that_is_not_tied(tmp_path):
    """Tokens of each weight alone; an adapter of tied weights there changes both, or is refused."""
    model = adapted(llama(), trainable_token_indices={"embed_tokens": [1], "lm_head": [1, 2]})
    assert not tied_layers(model)
    adapter = Adapter.from_model(model)
    rows = {name: adapter[f"{name}.weight"].nnz for name in ("model.embed_tokens", "lm_head")}
    assert rows == {"model.embed_tokens": 16, "lm_head": 32}
    with pytest.warns(UserWarning, match="no tied modules"):
        adapted(llama(), ensure_weight_tying=True)

    model = adapted(tied_llama(), trainable_token_indices=[3, 5])
    model.save_pretrained(tmp_path / "adapter")
    apart = llama(tie_word_embeddings=False)
    apart.load_state_dict(tied_llama().state_dict())
    with pytest.raises(FileFormatError, match=r"'lm_head.weight' is one with .*shira.Switch"):
        PeftModel.from_pretrained(copy.deepcopy(apart), tmp_path / "adapter")
    apart.save_pretrained(tmp_path / "apart")
    merge(tmp_path / "adapter", tmp_path / "apart", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    switch = Switch(apart)
    switch.load("a", tmp_path / "adapter")
    switch.activate("a")
    assert torch.equal(logits(apart), logits(model))
    assert torch.equal(logits(merged), logits(model))

    one = adapted(tied_llama(), target_modules=["embed_tokens"])  # PEFT's default: that one alone
    with pytest.raises(MergeError, match="ensure_weight_tying=True"):
        one.merge_adapter()
    one.save_pretrained(tmp_path / "one")
    tied_llama().save_pretrained(tmp_path / "tied")
    with pytest.raises(MergeError, match="ensure_weight_tying=True"):
        merge(tmp_path / "one", tmp_path / "tied", tmp_path / "out")


@pytest.mark.parametrize("hub", [True, False])
def test_new_tokens_in_an_embedding_that_was_resized(hub, tmp_path):
    """Their rows are random in each process: PEFT saves the embedding, or they are refused."""
    tied_llama().save_pretrained(tmp_path / "hub")

    def resized(seed):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
        torch.manual_seed(seed)
        base.resize_token_embeddings(66)
        return base

    options = {"save_embedding_layers": "auto" if hub else False}
    model = adapted(resized(1), trainable_token_indices=[64, 65])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter", **options)
    fresh = resized(2)
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.base_layer.weight)
    if not hub:
        with pytest.raises(WrongBaseError):
            PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        return
    back = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(back), logits(model))
    assert Adapter.load(tmp_path / "adapter") == Adapter.from_model(model)
    other = resized(3)
    other.model.embed_tokens.weight.data[:64] += 1  # another base altogether, but for the new rows
    another = PeftModel.from_pretrained(other, tmp_path / "adapter")  # the file brings its own
    assert torch.equal(another.lm_head.base_layer.weight, model.lm_head.base_layer.weight)


def test_operations_on_adapters():
    model = adapted(tied_llama(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    layer, (tied,) = model.get_input_embeddings(), tied_layers(model)
    config = ShiraConfig(target_modules=["lm_head"], ensure_weight_tying=True, density=0.3)
    model.add_adapter("b", config)
    randomize(model, 3)
    assert len(tied_layers(model)) == 1
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)
    assert layer.shira_weight["b"].requires_grad
    assert not layer.shira_weight["default"].requires_grad
    for grad in (True, False, False):
        with torch.set_grad_enabled(grad):
            mixed = model(input_ids=IDS, adapter_names=["default", "b"]).logits
        for row, whole in enumerate((a, b)):
            torch.testing.assert_close(mixed[row], whole[row], rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tied_llama()))
    assert layer.shira_weight["b"].requires_grad
    assert torch.equal(logits(model), b)
    model.merge_adapter()
    assert tied.merged_adapters == ["b"]
    assert torch.equal(logits(model), b)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(logits(model), b)
    tied.set_scale("b", 0.5)
    half = logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), half)
    assert not torch.equal(half, b)
    tied.set_scale("b", 1.0)
    model.add_weighted_adapter(["default", "b"], [1.0, 0.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), a)
    model.delete_adapter("sum")
    model.delete_adapter("b")
    model.set_adapter("default")
    assert torch.equal(logits(model), a)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), a)
    assert again.get_output_embeddings().tied_to is again.get_input_embeddings()


def test_all_of_the_step_is_compiled():
    model = adapted(tied_llama(), trainable_token_indices=[1, 2, 3])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, expected = (m(input_ids=IDS, labels=IDS).loss for m in (compiled, model))
    layer = model.get_input_embeddings()
    (one,) = torch.autograd.grad(loss, [layer.shira_weight["default"]])
    (two,) = torch.autograd.grad(expected, [layer.shira_weight["default"]])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(one, two)


class Shared(nn.Module):
    """Two linear layers and one by hand, with one weight among them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Linear(6, 6)
        self.c.weight.data = self.a.weight.data  # a parameter of its own, in the same memory

    def forward(self, x):
        return self.c(self.b(torch.tanh(self.a(x))))


def test_any_layers_that_share_a_weight():
    torch.manual_seed(0)
    base, x = Shared(), torch.randn(3, 6)
    plain = base(x)
    with pytest.raises(TargetError, match=r"share one weight.*ensure_weight_tying=True"):
        adapted(copy.deepcopy(base), target_modules=["a", "b"])
    model = adapted(base, target_modules=["b"], ensure_weight_tying=True, r=1)
    y = model(x)
    assert len(tied_layers(model)) == 2
    adapter = Adapter.from_model(model)
    assert [*adapter] == ["a.weight", "b.weight", "c.weight"]
    model.merge_adapter()
    assert torch.equal(model(x), y)
    model.unmerge_adapter()
    base = model.unload()
    assert torch.equal(base(x), plain)
    switch = Switch(base)
    with pytest.raises(TargetError, match="tied"):
        switch.load("one", adapter.restrict(["a.weight"]))
    switch.load("all", adapter)
    with switch.using("all"):
        assert torch.equal(base(x), y)


def test_masks_from_gradients_of_a_tied_weight():
    config = ShiraConfig(
        target_modules=["lm_head"],
        ensure_weight_tying=True,
        mask_type="grad",
        r=1,
        trainable_token_indices=[2],
    )
    base = tied_llama()
    config = calibrate(base, config, [{"input_ids": IDS, "labels": IDS}])
    base.requires_grad_(True)
    base(input_ids=IDS, labels=IDS).loss.backward()
    scores = base.lm_head.weight.grad.abs()
    chosen = get_peft_model(tied_llama(), config).get_input_embeddings().support("default")
    top = scores.flatten().topk(64 + 16).indices
    assert {*top.tolist(), *range(32, 48)} == {*chosen.indices.tolist()}


def test_modules_trained_whole_are_tied_as_lora_ties_them(tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = adapted(tied_llama(), **options)
    head = model.base_model.model.lm_head.modules_to_save["default"]
    embedding = model.base_model.model.model.embed_tokens.modules_to_save["default"]
    assert head.weight is embedding.weight
    with torch.no_grad():
        embedding.weight.mul_(1.5)
    y = logits(model)
    model.save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(PeftModel.from_pretrained(tied_llama(), tmp_path / "peft").eval()), y)
    adapter = Adapter.load(tmp_path / "peft")
    base = tied_llama()
    switch = Switch(base)
    switch.load("a", adapter)
    switch.activate("a")
    assert torch.equal(logits(base), y)
    tied_llama().save_pretrained(tmp_path / "base")
    merge(adapter, tmp_path / "base", tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), y)


@pytest.mark.parametrize("name", ["tokens", "embedding", "head"])
def test_as_a_lora_of_both(name, tmp_path):
    make, options = TIED[name]
    model = adapted(make(), **options | {"density": 0.2})
    peft.save_as_lora(tmp_path, model, rank=1.0)
    lora = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(TargetError, match="LoRA ties no others"):
        peft.convert_to_lora(
            adapted(tied_t5(), target_modules=["shared"], ensure_weight_tying=True), 1
        )


REFUSED = {
    "no list": ({"trainable_token_indices": 3}, ConfigError, "list of token numbers"),
    "none of them": ({"trainable_token_indices": []}, ConfigError, "list of token numbers"),
    "negative": ({"trainable_token_indices": [-1]}, ConfigError, "from 0"),
    "bool": ({"trainable_token_indices": {"embed_tokens": [True]}}, ConfigError, "embed_tokens"),
    "no name": ({"trainable_token_indices": {}}, ConfigError, "names no embedding"),
    "beyond": ({"trainable_token_indices": [64]}, TargetError, "token 64 .* 64 rows.*resize"),
    "unknown": ({"trainable_token_indices": {"embd": [1]}}, TargetError, "no module 'embd'"),
    "no rows": ({"trainable_token_indices": {"norm": [1]}}, TargetError, "no rows of tokens"),
    "different": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
        TargetError,
        "same rows",
    ),
    "entries of one": (
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        TargetError,
        "set ensure_weight_tying=True",
    ),
    "excluded": (
        {
            "target_modules": ["embed_tokens"],
            "exclude_modules": ["lm_head"],
            "ensure_weight_tying": True,
        },
        TargetError,
        "exclude_modules",
    ),
    "whole": (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        ConfigError,
        "trained whole",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    options, error, match = REFUSED[name]
    base = tied_llama()
    before = base_weights(base)
    with pytest.raises(error, match=match):
        adapted(base, **options)
    assert same_weights(before, base_weights(base))
    assert type(base.lm_head) is nn.Linear


def test_one_model_ties_a_weight_in_one_way():
    tying = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    alone = {"target_modules": ["embed_tokens"]}
    for first, second in ((tying, alone), (alone, tying), ({"target_modules": ["lm_head"]}, tying)):
        model = adapted(tied_llama(), **first)
        y = logits(model)
        with pytest.raises(TargetError, match="have it adapted in"):
            model.add_adapter("b", ShiraConfig(**second))
        assert [*model.peft_config] == ["default"]
        assert torch.equal(logits(model), y)
    with pytest.raises(ConfigError, match="PeftMixedModel"):
        PeftMixedModel(tied_llama(), ShiraConfig(**tying))


@pytest.mark.parametrize("name", ["embedding", "tokens alone"])
def test_a_deleted_adapter_leaves_the_modules_tied(name):
    make, options = TIED[name]
    model, alone = adapted(make(), **options), {"target_modules": ["embed_tokens"]}
    model.delete_adapter("default")
    with pytest.raises(TargetError, match=r"otherwise.*unload\(\)"):
        model.add_adapter("b", ShiraConfig(**alone))
    assert torch.equal(logits(model), logits(make()))
    again = adapted(model.unload(), **alone)
    assert torch.equal(logits(again), logits(adapted(make(), **alone)))


def test_a_packed_weight_is_trained_in_all_its_modules_and_not_merged(monkeypatch):
    patched(monkeypatch)
    torch.manual_seed(0)
    base, x = Shared(), torch.randn(3, 6)
    QUANTIZERS["stand-in"][1](base, ["a", "b"])
    base.b.weight, base.b.scale = base.a.weight, base.a.scale
    plain = base(x)
    model = adapted(base, target_modules=["a"], ensure_weight_tying=True, r=1)
    assert len(tied_layers(model)) == 1
    y = model(x)
    assert not torch.equal(y, plain)
    y.sum().backward()
    with pytest.raises(MergeError, match=r"quantized weight that modules share"):
        model.merge_and_unload(requantize=True)
    assert torch.equal(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


def test_tokens_tie_no_other_weight():
    """Of two layers that share one, the target is adapted alone unless the tie was asked for."""
    base = llama()
    one, two = (layer.self_attn for layer in base.model.layers)
    two.q_proj.weight = one.q_proj.weight
    name = "model.layers.0.self_attn.q_proj"
    options = {"target_modules": [name], "trainable_token_indices": [1]}
    assert not tied_layers(adapted(copy.deepcopy(base), **options))
    assert len(tied_layers(adapted(base, ensure_weight_tying=True, **options))) == 1
