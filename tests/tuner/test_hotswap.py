# SPDX-License-Identifier: Apache-2.0
"""PEFT's hot swapping on SHiRA: all of the new adapter or nothing, and compiled code goes on."""

from __future__ import annotations

import peft
import peft.utils.hotswap
import pytest
import torch
from peft.utils.hotswap import (  # before shira, as one imports
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from safetensors.torch import load_file, save_file

from shira import Adapter, PeftModel, ShiraConfig, get_peft_model
from shira.errors import (
    AdapterError,
    ConfigError,
    FileFormatError,
    MergeError,
    ShiraError,
    UnknownAdapterError,
    WrongBaseError,
)

from .models import EVERYTHING, base_weights, everything, llama, mlp, randomize, same_weights

IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def saved(folder, build, targets, seed, **options):
    """An adapter on disk; its folder."""
    config = ShiraConfig(target_modules=targets, random_seed=seed, **options)
    model = get_peft_model(build(), config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def loaded(build, folder, **options):
    return PeftModel.from_pretrained(build(), folder, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folders(tmp_path):
    targets = ["q_proj", "down_proj"]
    return [saved(tmp_path / str(r), llama, targets, seed=r, r=r) for r in (2, 3, 1)]


def test_without_compiling_any_number_of_entries(folders):
    model = loaded(llama, folders[0])
    before = base_weights(model)
    for folder in (*folders[1:], folders[0]):
        hotswap_adapter(model, folder, "default", torch_device="cpu")
        wanted = loaded(llama, folder)
        assert torch.equal(logits(model), logits(wanted))
        assert Adapter.from_model(model) == Adapter.from_model(wanted)
        config, theirs = model.peft_config["default"], wanted.peft_config["default"]
        assert (config.r, config.random_seed) == (theirs.r, theirs.random_seed)
        assert config.base_fingerprint == theirs.base_fingerprint
    assert same_weights(base_weights(model), before)


def test_a_prepared_model_is_compiled_once(folders, tmp_path):
    model = loaded(llama, folders[0])
    before, wanted = base_weights(model), [logits(loaded(llama, folder)) for folder in folders]
    prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert torch.equal(logits(model), wanted[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), wanted[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (1, 2, 0, 2, 1):
            hotswap_adapter(compiled, folders[number], "default", torch_device="cpu")
            assert torch.equal(logits(compiled), wanted[number])
            assert torch.equal(logits(model), wanted[number])
            model.save_pretrained(tmp_path / "again")
            assert torch.equal(logits(loaded(llama, tmp_path / "again")), wanted[number])
    assert same_weights(base_weights(model), before)


def test_without_preparing_a_further_size_compiles_anew(tmp_path):
    one, two = (saved(tmp_path / str(r), mlp, ["lin1"], seed=r, r=r) for r in (1, 2))
    model = loaded(mlp, one)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    hotswap_adapter(compiled, two, "default", torch_device="cpu")
    assert torch.equal(compiled(X), loaded(mlp, two)(X))


def test_a_room_for_as_many_entries(tmp_path):
    """Without a target_rank adapters of one size go in and out."""
    one, two = (saved(tmp_path / str(s), mlp, ["lin1"], seed=s, density=0.2) for s in (1, 2))
    model = loaded(mlp, one)
    model(X)  # packs the positions
    prepare_model_for_compiled_hotswap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(compiled, two, "default", torch_device="cpu")
        assert torch.equal(compiled(X), loaded(mlp, two)(X))


def test_every_layer_type(tmp_path):
    options = {"density": 0.1}
    one, two = (saved(tmp_path / str(s), everything, EVERYTHING, seed=s, **options) for s in (1, 2))
    model = loaded(everything, one)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(IDS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(compiled, two, "default", torch_device="cpu")
        torch.testing.assert_close(compiled(IDS), loaded(everything, two)(IDS))


def test_experts(tmp_path):
    from tests.reach.layers import target_parameters

    case = target_parameters()
    targets = {"target_parameters": ["mlp.experts.gate_up_proj"]}

    def build():
        torch.manual_seed(0)
        return case.build()

    one, two = (
        saved(tmp_path / str(r), build, case.targets["target_modules"], seed=r, r=r, **targets)
        for r in (1, 2)
    )
    model = loaded(build, one)
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    (layer,) = (m for m in model.modules() if hasattr(m, "shira_weight"))
    assert layer.shira_weight["default"].numel() == 2 * 4 * (16 + 16)
    hotswap_adapter(model, two, "default", torch_device="cpu")
    with torch.no_grad():
        assert torch.equal(case.call(model), case.call(loaded(build, two)))


def test_tied_weights(tmp_path):
    def build():
        return llama(tie_word_embeddings=True)

    targets, tying = ["embed_tokens", "lm_head"], {"ensure_weight_tying": True}
    one, two = (saved(tmp_path / str(r), build, targets, seed=r, r=r, **tying) for r in (1, 2))
    for prepared in (False, True):
        model = loaded(build, one)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=2)
        hotswap_adapter(model, two, "default", torch_device="cpu")
        assert torch.equal(logits(model), logits(loaded(build, two)))
        assert not torch.equal(logits(model), logits(loaded(build, one)))


def test_layers_without_entries_in_the_new_one_are_the_base(tmp_path):
    both = saved(tmp_path / "both", mlp, ["lin1", "lin2"], seed=1, r=1)
    less = saved(tmp_path / "less", mlp, ["lin2"], seed=2, r=2)
    model = loaded(mlp, both)
    hotswap_adapter(model, less, "default", torch_device="cpu")
    assert torch.equal(model(X), loaded(mlp, less)(X))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(loaded(mlp, tmp_path / "again")(X), model(X))
    hotswap_adapter(model, both, "default", torch_device="cpu")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(loaded(mlp, tmp_path / "again")(X), loaded(mlp, both)(X))


def test_the_others_stay(tmp_path):
    one, two, three = (saved(tmp_path / str(s), mlp, ["lin1"], seed=s, r=1) for s in (1, 2, 3))
    model = loaded(mlp, one)
    model.load_adapter(two, "two")
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    hotswap_adapter(model, three, "two", torch_device="cpu")
    assert torch.equal(model(X), loaded(mlp, one)(X))
    model.set_adapter("two")
    assert torch.equal(model(X), loaded(mlp, three)(X))


def test_gradients_are_those_of_the_new_positions(tmp_path):
    one, two = (saved(tmp_path / str(s), mlp, ["lin1"], seed=s, density=0.2) for s in (1, 2))
    model = loaded(mlp, one, is_trainable=True)
    prepare_model_for_compiled_hotswap(model, target_rank=3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X).square().sum().backward()
    model.zero_grad()
    hotswap_adapter(compiled, two, "default", torch_device="cpu")
    compiled(X).square().sum().backward()
    wanted = loaded(mlp, two, is_trainable=True)
    wanted(X).square().sum().backward()
    layer, other = (m.base_model.model.lin1 for m in (model, wanted))
    place = layer.support("default").positions_of(other.support("default"))
    got = layer.shira_weight["default"].grad[place]
    torch.testing.assert_close(got, other.shira_weight["default"].grad)


def test_without_a_peft_model(tmp_path):
    model = llama()
    model.add_adapter(ShiraConfig(r=1, target_modules=["q_proj"], random_seed=0))
    folder = saved(tmp_path, llama, ["q_proj"], seed=1, r=2)
    state = load_file(folder / "adapter_model.safetensors")
    state = {f"{k.removeprefix('base_model.model.')}.default": v for k, v in state.items()}
    config = peft.PeftConfig.from_pretrained(folder)
    peft.utils.hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
    assert torch.equal(logits(model.eval()), logits(loaded(llama, folder)))


# ------------------------------------------------------------------------------------------ refused


def refused(model, folder, error, match):
    """Exchanging fails so, and changes nothing."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = dict(vars(model.peft_config["default"]))
    assert issubclass(error, ShiraError)
    with pytest.raises(error, match=match):
        hotswap_adapter(model, folder, "default", torch_device="cpu")
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)
    assert vars(model.peft_config["default"]) == config


def test_what_is_refused(tmp_path):
    one = saved(tmp_path / "one", mlp, ["lin1"], seed=1, r=1)
    model = loaded(mlp, one)
    wide = saved(tmp_path / "wide", mlp, ["lin1", "lin2"], seed=2, r=1)
    refused(model, wide, AdapterError, "layers that adapter 'default' of this model lacks: 'lin2'")
    other = saved(tmp_path / "other", lambda: mlp(seed=9), ["lin1"], seed=2, r=1)
    refused(model, other, WrongBaseError, "lin1.weight")
    head = saved(tmp_path / "head", mlp, ["lin1"], seed=2, r=1, modules_to_save=["lin2"])
    refused(model, head, AdapterError, "trains whole modules is not exchanged in place")
    damaged = saved(tmp_path / "damaged", mlp, ["lin1"], seed=2, r=1)
    state = load_file(damaged / "adapter_model.safetensors")
    key = next(key for key in state if key.endswith("shira_indices"))
    state[key][0, 0] = 1000
    save_file(state, damaged / "adapter_model.safetensors")
    refused(model, damaged, FileFormatError, "damaged")
    model.merge_adapter()
    refused(model, one, MergeError, "'default' is merged")


def test_a_name_that_is_not_there(tmp_path):
    model = loaded(mlp, saved(tmp_path, mlp, ["lin1"], seed=1, r=1))
    with pytest.raises(UnknownAdapterError, match="no SHiRA adapter 'two' to exchange"):
        hotswap_adapter(model, tmp_path, "two", torch_device="cpu")


def test_more_than_there_is_room_for(tmp_path):
    one, big = (saved(tmp_path / str(r), mlp, ["lin1"], seed=r, r=r) for r in (1, 3))
    model = loaded(mlp, big)
    with pytest.raises(ConfigError, match=r"72 entries, and target_rank=2 .* the least rank .* 3"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    model = loaded(mlp, one)
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    refused(model, big, AdapterError, r"72 entries, .* room for 48; .* target_rank=3")
    compiled = torch.compile(loaded(mlp, one), backend="eager")
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=3)
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(mlp(), target_rank=3)


def test_an_interrupt_half_way(tmp_path, monkeypatch):
    from shira.tuner import hotswap

    one, two = (saved(tmp_path / str(s), mlp, ["lin1", "lin2"], s, r=s) for s in (1, 2))
    for prepared in (False, True):
        model = loaded(mlp, one)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        wanted, real, calls = model(X), hotswap.digest_of, []

        def second(support, real=real, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(support)

        monkeypatch.setattr(hotswap, "digest_of", second)
        with pytest.raises(KeyboardInterrupt):
            hotswap_adapter(model, two, "default", torch_device="cpu")
        monkeypatch.setattr(hotswap, "digest_of", real)
        now = model.state_dict()
        assert all(torch.equal(now[key], before[key]) for key in before)
        assert torch.equal(model(X), wanted)
