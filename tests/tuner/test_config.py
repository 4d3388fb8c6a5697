# SPDX-License-Identifier: Apache-2.0
"""`ShiraConfig`: PEFT's fields and meaning, ours, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from peft import PeftConfig, PeftType

from shira import ShiraConfig, get_peft_model
from shira.errors import ConfigError, MaskError

from .models import mlp
from .stock import StockConfig


def test_every_field_and_default_of_pefts():
    ours = {field.name: field for field in dataclasses.fields(ShiraConfig)}
    for field in dataclasses.fields(StockConfig):
        assert ours[field.name].default == field.default
    config = ShiraConfig()
    assert config.peft_type == PeftType.SHIRA
    assert callable(config.mask_fn)
    assert ShiraConfig(target_modules=["q", "v"]).target_modules == {"q", "v"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, ["r", "positive"]),
        ({"r": -3}, ["r", "-3"]),
        ({"r": 1.5}, ["r", "1.5"]),
        ({"r": True}, ["r", "True"]),
        ({"density": 0.0}, ["density", "0.0"]),
        ({"density": 1.5}, ["density", "1.5"]),
        ({"density": float("nan")}, ["density", "nan"]),
        ({"density": "1%"}, ["density", "1%"]),
        ({"mask_type": "randon"}, ["Did you mean 'random'"]),
        ({"mask_type": "Magnitude"}, ["Did you mean 'magnitude'"]),
        ({"mask_type": 3}, ["mask_type", "3"]),
        ({"mask_slot": -1}, ["mask_slot", "-1"]),
        ({"mask_slot": 1, "mask_type": "magnitude"}, ["slots", "magnitude"]),
        ({"random_seed": "7"}, ["random_seed", "'7'"]),
        ({"mask_type": "magnitude", "mask_options": {"larges": 1}}, ["Did you mean 'largest'"]),
        ({"mask_options": {"slot": 2}}, ["slot"]),
        ({"mask_type": "block", "mask_options": {"block_size": 0}}, ["block_size", "not 0"]),
        ({"mask_type": "block", "mask_options": {"score": "gradient"}}, ["Did you mean 'grad'"]),
        ({"mask_type": "block_diagonal", "mask_options": {"score": "snip"}}, ["block_size"]),
        ({"mask_slot": 1, "mask_type": "block"}, ["slots", "block"]),
        ({"rank_pattern": {"lin": 0}}, ["rank_pattern['lin']"]),
        ({"layers_to_transform": [1], "target_modules": "lin.*"}, ["layers_to_transform"]),
        ({"layers_pattern": "layers"}, ["layers_to_transform"]),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        ShiraConfig(**options)
    assert isinstance(caught.value, ValueError)
    assert all(word in str(caught.value) for word in words)


def test_a_mask_of_ones_own_needs_its_function():
    with pytest.warns(UserWarning, match="mask_fn"):
        config = ShiraConfig(mask_type="my_custom_mask", target_modules=["lin1"], r=1)
    assert config.mask_fn is None
    with pytest.raises(MaskError, match=r"lin1\.weight.*my_custom_mask"):
        get_peft_model(mlp(), config)


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (lambda layer, r: torch.ones_like(layer.weight), "144"),
        (lambda layer, r: torch.ones(3, 3), "shape"),
        (lambda layer, r: layer.weight, "no mask"),
        (lambda layer, r: None, "NoneType"),
    ],
)
def test_a_mask_function_that_returns_no_mask(mask, word):
    config = ShiraConfig(target_modules=["lin1"], r=1)
    config.mask_fn = mask
    with pytest.raises(MaskError, match=word) as caught:
        get_peft_model(mlp(), config)
    assert "lin1.weight" in str(caught.value)


def test_a_drawn_seed_is_recorded_and_leads_to_the_same_mask(tmp_path):
    torch.manual_seed(0)
    config = ShiraConfig(r=1, target_modules=["lin1"])
    assert config.random_seed is None
    model = get_peft_model(mlp(), config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(saved["random_seed"], int)
    again = ShiraConfig(r=1, target_modules=["lin1"], random_seed=saved["random_seed"])
    support = get_peft_model(mlp(), again).base_model.model.lin1.support("default")
    assert support == model.base_model.model.lin1.support("default")
    base = mlp()
    torch.manual_seed(1)
    other = get_peft_model(base, ShiraConfig(r=1, target_modules=["lin1"]))
    assert other.base_model.model.lin1.support("default") != support


def test_saved_and_read_again(tmp_path):
    config = ShiraConfig(
        density=0.1, mask_type="magnitude", mask_options={"largest": False}, target_modules=["a"]
    )
    config.save_pretrained(tmp_path)
    for cls in (ShiraConfig, PeftConfig):
        assert cls.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_plain_config_says_nothing_that_peft_does_not_know(tmp_path):
    ShiraConfig(target_modules=["a"], random_seed=1).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved) <= {field.name for field in dataclasses.fields(StockConfig)}


@pytest.mark.parametrize(
    ("mask_type", "mask_options"),
    [
        ("struct", None),
        ("magnitude", None),
        ("random", None),
        ("block", None),
        ("block", {"block_size": 5, "score": "magnitude"}),
        ("block_diagonal", {"block_size": 4}),
    ],
)
def test_masks_that_need_no_data(mask_type, mask_options):
    config = ShiraConfig(
        r=2,
        mask_type=mask_type,
        mask_options=mask_options,
        target_modules=["lin1", "lin2"],
        random_seed=0,
    )
    one, two = get_peft_model(mlp(), config), get_peft_model(mlp(), config)
    for name in ("lin1", "lin2"):
        layer = getattr(one.base_model.model, name)
        support = layer.support("default")
        assert support.nnz == 2 * sum(layer.weight.shape)
        assert support == getattr(two.base_model.model, name).support("default")


@pytest.mark.parametrize("mask_type", ["grad", "snip"])
def test_masks_that_need_data_say_so(mask_type):
    with pytest.raises(MaskError, match=r"shira\.calibrate"):
        get_peft_model(mlp(), ShiraConfig(r=1, mask_type=mask_type, target_modules=["lin1"]))


def test_layers_by_number_and_exclusion():
    from .models import llama

    config = ShiraConfig(
        r=1, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    model = get_peft_model(llama(), config)
    names = [f"model.layers.1.self_attn.{which}" for which in ("q_proj", "v_proj")]
    assert sorted(model.targeted_module_names) == names
    config = ShiraConfig(r=1, target_modules="all-linear", exclude_modules=r".*mlp.*")
    names = get_peft_model(llama(), config).targeted_module_names
    assert len(names) == 8
    assert not any("mlp" in name or "lm_head" in name for name in names)


def test_fan_in_fan_out_on_a_plain_linear_layer_is_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        config = ShiraConfig(r=1, target_modules=["lin1"], fan_in_fan_out=True)
        get_peft_model(mlp(), config)(torch.randn(2, 8))
