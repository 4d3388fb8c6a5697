# SPDX-License-Identifier: Apache-2.0
"""PEFT uses our classes, whoever asks it, and stock configurations are taken as ours."""

from __future__ import annotations

import warnings

import peft
import peft.mapping
import peft.tuners
import peft.tuners.shira
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType, inject_adapter_in_model

import shira
from shira import ShiraConfig, ShiraLayer, ShiraModel, get_peft_model
from tests.forked import program

from .models import llama, mlp, randomize
from .stock import StockConfig, fixed_mask

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_every_place():
    for place in (peft, peft.tuners, peft.tuners.shira):
        assert place.ShiraConfig is ShiraConfig
        assert place.ShiraModel is ShiraModel
    assert peft.tuners.shira.ShiraLayer is ShiraLayer
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SHIRA] is ShiraConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SHIRA] is ShiraModel
    assert shira.PeftModel is peft.PeftModel
    assert shira.get_peft_model is peft.get_peft_model


def test_registering_again_changes_nothing():
    import peft.tuners.mixed.model as mixed

    from shira.tuner import register

    before = (mixed.Configs, mixed.Layers, mixed.shira)
    register()
    assert (mixed.Configs, mixed.Layers, mixed.shira) == before


def test_a_peft_that_no_test_has_seen_warns_and_one_that_is_too_old_is_refused():
    from shira.tuner import _check_version

    with pytest.warns(UserWarning, match=r"0\.22\.1 is installed"):
        _check_version("0.22.1")
    with pytest.raises(shira.ShiraError, match=r"needs PEFT 0\.21\.2 or newer, but 0\.21\.1"):
        _check_version("0.21.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_version("0.21.2")


def test_a_stock_configuration_made_before_our_import():
    code = """
from peft import ShiraConfig as Stock, get_peft_model
plain = Stock(r=1, target_modules=["0"], random_seed=3)
own = Stock(r=1, target_modules=["0"], mask_type="mine")
own.mask_fn = lambda layer, r: (layer.weight * 0).flatten().index_fill(
    0, __import__("torch").arange(8), 1).view(layer.weight.shape)
import torch
import shira.tuner
for config in (plain, own):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    layer = model.base_model.model[0]
    assert isinstance(layer, shira.ShiraLayer), type(layer)
    assert isinstance(model.peft_config["default"], shira.ShiraConfig)
assert layer.support("default").indices.tolist() == list(range(8))
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), plain, mixed=True)
assert isinstance(model.base_model.model[0], shira.ShiraLayer)
"""
    program(code)


def test_inject_adapter_in_model():
    model = inject_adapter_in_model(ShiraConfig(r=1, target_modules=["lin1"]), mlp())
    assert isinstance(model.lin1, ShiraLayer)


def test_mixed_model(tmp_path):
    model = get_peft_model(
        mlp(), ShiraConfig(r=1, target_modules=["lin1"]), adapter_name="sparse", mixed=True
    )
    assert isinstance(model, PeftMixedModel)
    model.add_adapter("low", LoraConfig(target_modules=["lin2"], r=2))
    randomize(model)
    sparse = model.set_adapter("sparse") or model(X)
    with model.disable_adapter():
        assert not torch.equal(model(X), sparse)
    model.set_adapter(["sparse", "low"])
    model(X).sum().backward()
    model.set_adapter("sparse")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), sparse)


def test_transformers_add_adapter_and_load_adapter(tmp_path):
    ids = torch.randint(64, (2, 5))
    model = llama()
    base = model(ids).logits
    model.add_adapter(ShiraConfig(r=2, target_modules=["q_proj", "v_proj"], random_seed=1))
    randomize(model)
    want = model(ids).logits
    assert not torch.equal(want, base)
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(str(tmp_path))
    assert isinstance(again.model.layers[0].self_attn.q_proj, ShiraLayer)
    assert torch.equal(again(ids).logits, want)
    again.disable_adapters()
    assert torch.equal(again(ids).logits, base)


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_stock_peft_and_back(tmp_path):
    """Stock writes, we read; we write, stock reads; the outputs are the same."""
    common = f"""
import torch, sys
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parents[2])!r})
import peft
from peft import PeftModel, ShiraConfig, get_peft_model
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 6))
x = torch.randn(5, 8)
"""
    write = (
        common
        + f"""
model = get_peft_model(base, ShiraConfig(r=2, target_modules=["0", "2"], random_seed=1))
with torch.no_grad():
    [p.normal_() for n, p in model.named_parameters() if "shira_weight" in n]
model.save_pretrained({str(tmp_path / "stock")!r})
torch.save((base[0], x, model(x)), {str(tmp_path / "stock.pt")!r})
assert "shira" not in sys.modules
"""
    )
    program(write)
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 6))
    _, x, want = torch.load(tmp_path / "stock.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, tmp_path / "stock")
    torch.testing.assert_close(model(x), want)
    model.save_pretrained(tmp_path / "ours")
    read = (
        common
        + f"""
model = PeftModel.from_pretrained(base, {str(tmp_path / "ours")!r})
assert type(model.base_model.model[0]).__module__ == "peft.tuners.shira.layer"
_, x, want = torch.load({str(tmp_path / "stock.pt")!r}, weights_only=False)
torch.testing.assert_close(model(x), want)
"""
    )
    program(read)


@pytest.mark.filterwarnings("ignore")
def test_a_stock_config_object_converts():
    from shira.tuner.config import as_ours

    stock = StockConfig(r=3, target_modules=["a"], mask_type="own", modules_to_save=["b"])
    stock.mask_fn = fixed_mask
    ours = as_ours(stock)
    assert (ours.r, ours.target_modules, ours.modules_to_save) == (3, {"a"}, ["b"])
    assert ours.mask_fn is fixed_mask
    assert as_ours(ours) is ours
