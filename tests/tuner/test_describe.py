# SPDX-License-Identifier: Apache-2.0
"""The saved configuration says what is in the file, however the positions came to be there."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from shira import Adapter, ShiraConfig, get_peft_model
from shira.errors import AdapterError

from .models import llama, mlp, randomize

X = torch.arange(12)[None]
ONE, TWO = {"random_seed": 1}, {"random_seed": 2}


def adapted(base=llama, seed=1, **options):
    options = {"r": 1, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(base(), ShiraConfig(**options)).eval()
    randomize(model, seed)
    return model


def config_in(path):
    return json.loads((path / "adapter_config.json").read_text())


def check(model, path, want, base=llama):
    """Save, load on the right base, and compare."""
    model.save_pretrained(path)
    again = PeftModel.from_pretrained(base(), path).eval()
    assert torch.equal(again(X).logits, want)
    again.save_pretrained(path / "again")
    assert Adapter.load(path / "again") == Adapter.load(path)
    assert config_in(path / "again")["base_fingerprint"] == config_in(path)["base_fingerprint"]
    return config_in(path)


def by_load_state_dict(model, other, tmp_path):
    model.load_state_dict(other.state_dict())


def by_assigning(model, other, tmp_path):
    model.load_state_dict(other.state_dict(), assign=True)


def by_set_peft_model_state_dict(model, other, tmp_path):
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def by_load_adapter(model, other, tmp_path):
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "default")


def by_hand(model, other, tmp_path):
    layers = dict(other.named_modules())
    for path, layer in model.named_modules():
        if hasattr(layer, "shira_indices"):
            layer.shira_weight["default"] = layers[path].shira_weight["default"]
            layer.shira_indices["default"] = layers[path].shira_indices["default"]


def by_accelerate(model, other, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a Trainer of another test may have chosen a precision
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(other)
    accelerator.save_state(tmp_path / "state")
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.load_state(tmp_path / "state")


def by_trainer(model, other, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": X[0], "labels": X[0]}] * 2

    def trainer(model, **more):
        options = TrainingArguments(
            tmp_path / "run", max_steps=1, save_steps=1, report_to=[], use_cpu=True, **more
        )
        return Trainer(model, options, train_dataset=data)

    trainer(other, learning_rate=0.0).train()
    trainer(model, learning_rate=0.0).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
    )
    model.eval()


WAYS = [
    by_load_state_dict,
    by_assigning,
    by_set_peft_model_state_dict,
    by_load_adapter,
    by_hand,
    by_accelerate,
    by_trainer,
]


@pytest.mark.parametrize("way", WAYS)
def test_positions_of_another_seed(tmp_path, way):
    model, other = adapted(**TWO), adapted(**ONE)
    want = other(X).logits
    way(model, other, tmp_path)
    assert torch.equal(model(X).logits, want)
    config = check(model, tmp_path / "saved", want)
    assert config["random_seed"] is None
    assert config["mask_type"] == "random"
    assert config["r"] == 1
    assert config["base_fingerprint"] == other.peft_config["default"].to_dict()["base_fingerprint"]
    assert Adapter.from_model(model).metadata["random_seed"] is None
    Adapter.from_model(model).save(tmp_path / "compact.safetensors")
    assert Adapter.load(tmp_path / "compact.safetensors") == Adapter.load(tmp_path / "saved")


@pytest.mark.parametrize("way", [by_load_state_dict, by_load_adapter])
def test_positions_of_the_same_seed_keep_it(tmp_path, way):
    model, other = adapted(seed=2, **ONE), adapted(**ONE)
    way(model, other, tmp_path)
    config = check(model, tmp_path / "saved", other(X).logits)
    assert config["random_seed"] == 1


def test_another_count(tmp_path):
    model, other = adapted(**TWO), adapted(r=2, **ONE)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert check(model, tmp_path / "r", other(X).logits)["r"] == 2
    model, other = adapted(density=0.3, **TWO), adapted(density=0.1, mask_slot=2, **ONE)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    config = check(model, tmp_path / "density", other(X).logits)
    assert not {"density", "mask_slot"} & set(config)
    assert config["r"] == 1  # 0.1 of 16 x 16 entries
    pattern = {"v_proj": 3}
    model, other = adapted(rank_pattern=pattern, **TWO), adapted(**ONE)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert "rank_pattern" not in check(model, tmp_path / "pattern", other(X).logits)
    model, other = adapted(rank_pattern=pattern, **TWO), adapted(rank_pattern=pattern, **ONE)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    config = check(model, tmp_path / "same", other(X).logits)
    assert (config["rank_pattern"], config["r"]) == (pattern, 1)


def test_another_base(tmp_path):
    model, other = adapted(**ONE), adapted(lambda: llama(seed=5), **ONE)
    model.load_state_dict(other.state_dict())
    check(model, tmp_path, other(X).logits, lambda: llama(seed=5))


def test_two_models_and_two_adapters_with_one_configuration(tmp_path):
    config = ShiraConfig(r=1, target_modules=["q_proj"], random_seed=1)
    first = get_peft_model(llama(), config).eval()
    first.add_adapter("other", config)
    second = get_peft_model(llama(seed=5), config).eval()
    randomize(first, 2)
    randomize(second, 3)
    loaded = adapted(target_modules=["q_proj"], **TWO)
    set_peft_model_state_dict(first, get_peft_model_state_dict(loaded), "other")
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    assert config_in(tmp_path / "first")["random_seed"] == 1
    assert config_in(tmp_path / "first" / "other")["random_seed"] is None
    for model, path, base in [
        (first, tmp_path / "first", llama()),
        (loaded, tmp_path / "first" / "other", llama()),
        (second, tmp_path / "second", llama(seed=5)),
    ]:
        assert torch.equal(PeftModel.from_pretrained(base, path).eval()(X).logits, model(X).logits)
    for model in (first, second):
        found = Adapter.from_model(model).metadata
        assert found["base_fingerprint"] == config_in(tmp_path / "second")["base_fingerprint"] or (
            model is first
        )


def test_a_copied_model_describes_itself(tmp_path):
    model, other = adapted(**TWO), adapted(**ONE)
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    copied.save_pretrained(tmp_path / "copied")
    assert config_in(tmp_path / "copied")["random_seed"] == 2
    assert check(model, tmp_path / "model", other(X).logits)["random_seed"] is None


def test_the_configuration_saved_by_itself(tmp_path):
    model, other = adapted(**TWO), adapted(**ONE)
    model.load_state_dict(other.state_dict())
    model.peft_config["default"].save_pretrained(tmp_path)
    assert config_in(tmp_path)["random_seed"] is None


def test_the_configuration_of_a_model_that_is_unloaded(tmp_path):
    model, other = adapted(**TWO), adapted(**ONE)
    model.load_state_dict(other.state_dict())
    config = model.peft_config["default"]
    model.unload()
    assert config.to_dict()["random_seed"] is None


def test_transformers_own_saving(tmp_path):
    models = []
    for seed in (2, 1):
        model = llama()
        model.add_adapter(ShiraConfig(r=1, target_modules=["q_proj"], random_seed=seed))
        randomize(model)
        models.append(model.eval())
    models[0].load_state_dict(models[1].state_dict())
    models[0].save_pretrained(tmp_path)
    assert config_in(tmp_path)["random_seed"] is None
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(X).logits, models[1](X).logits)


def test_mixed_models(tmp_path):
    from peft import PeftMixedModel

    config = ShiraConfig(r=1, target_modules=["q_proj"], random_seed=2)
    model = PeftMixedModel(llama(), config).eval()
    other = adapted(target_modules=["q_proj"], **ONE)
    model.load_state_dict(other.state_dict())
    fields = model.peft_config["default"].to_dict()
    assert fields["random_seed"] is None
    assert fields["base_fingerprint"] == other.peft_config["default"].to_dict()["base_fingerprint"]


def test_a_state_dict_of_other_positions_than_the_models(tmp_path):
    model, other = adapted(**TWO), adapted(**ONE)
    with pytest.raises(AdapterError, match=r"shira_indices.*load the state dict into the model"):
        model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "strip"])
def test_state_dicts_of_another_wrapping(tmp_path, prefix):
    model = adapted(modules_to_save=["lm_head"], **ONE)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    want = model(X).logits
    state = {
        key.removeprefix("base_model.model.") if prefix == "strip" else prefix + key: value
        for key, value in model.state_dict().items()
    }
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path).eval()(X).logits, want)


def test_wrapped_parts_of_a_model(tmp_path):
    base = llama()
    base.model.layers[0] = torch.compile(base.model.layers[0])
    model = get_peft_model(base, ShiraConfig(r=1, target_modules=["q_proj"], random_seed=1)).eval()
    randomize(model)
    state = {key.replace("_orig_mod.", ""): value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    names = {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    assert set(Adapter.load(tmp_path)) == {f"{name}.weight" for name in names}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.{kind}"
        for name in names
        for kind in ("shira_weight", "shira_indices")
    }


def test_a_state_dict_without_the_adapter(tmp_path):
    model = adapted(**ONE)
    for state in ({}, llama().state_dict(), {"foo." + k: v for k, v in model.state_dict().items()}):
        with pytest.raises(AdapterError, match=r"no 'base_model\.model\.model\.layers\.0.*q_proj"):
            model.save_pretrained(tmp_path, state_dict=state)
    twice = {**model.state_dict(), **{"module." + k: v for k, v in model.state_dict().items()}}
    with pytest.raises(AdapterError, match="both names of"):
        model.save_pretrained(tmp_path, state_dict=twice)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_meta_base_has_no_fingerprint(tmp_path):
    model = get_peft_model(mlp(), ShiraConfig(r=1, target_modules=["lin1"], random_seed=1))
    model.base_model.model.lin1.base_layer.weight = nn.Parameter(torch.empty(12, 12, device="meta"))
    model.save_pretrained(tmp_path)
    assert "base_fingerprint" not in config_in(tmp_path)
