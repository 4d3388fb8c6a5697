# SPDX-License-Identifier: Apache-2.0
"""What `save_pretrained` writes: few bytes, a dtype of one's choice; and stock PEFT reads it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shira import Adapter, PeftModel, ShiraConfig, get_peft_model
from shira.errors import AdapterError, ConfigError
from tests.forked import program

from .models import mlp, randomize

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def saved(path, **options):
    config = ShiraConfig(r=2, target_modules=["lin1", "lin2"], random_seed=3, **options)
    model = get_peft_model(mlp(), config).eval()
    randomize(model)
    model.save_pretrained(path)
    return model


def dtypes(path):
    return {
        key.rpartition(".")[2]: value.dtype
        for key, value in load_file(path / "adapter_model.safetensors").items()
    }


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_the_config_says_in_which_dtype(tmp_path, dtype):
    model = saved(tmp_path, save_dtype=dtype)
    stored = getattr(torch, dtype or "float32")
    assert dtypes(tmp_path) == {"shira_weight": stored, "shira_indices": torch.int16}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.get("save_dtype") == dtype
    assert ("save_dtype" in config) == (dtype is not None)
    # The model itself goes on with what it has.
    layer = model.base_model.model.lin1
    assert layer.shira_weight["default"].dtype == torch.float32
    assert layer.shira_indices["default"].dtype == torch.int32
    again = PeftModel.from_pretrained(mlp(), tmp_path).base_model.model.lin1
    assert again.shira_weight["default"].dtype == torch.float32
    assert again.shira_indices["default"].dtype == torch.int32
    assert torch.equal(again.shira_indices["default"], layer.shira_indices["default"])
    expected = layer.shira_weight["default"].detach().to(stored).float()
    assert torch.equal(again.shira_weight["default"].detach(), expected)
    ours = Adapter.load(tmp_path)["lin1.weight"]
    assert ours.values.dtype == stored
    assert torch.equal(ours.values.float(), expected)


def test_six_bytes_a_parameter(tmp_path):
    base = nn.Sequential(nn.Linear(512, 512, bias=False))
    config = ShiraConfig(
        density=0.02, target_modules=["0"], random_seed=3, init_weights=False, save_dtype="bfloat16"
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    k = model.base_model.model[0].shira_weight["default"].numel()
    assert k == round(0.02 * 512 * 512)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size / k < 6.1


def test_indices_that_do_not_fit_in_two_bytes(tmp_path):
    base = nn.ModuleDict({"small": nn.Linear(4, 6), "wide": nn.Linear(40_000, 2)})
    config = ShiraConfig(r=1, target_modules=["small", "wide"], random_seed=3)
    get_peft_model(base, config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model"
    assert tensors[f"{prefix}.small.shira_indices"].dtype == torch.int16
    assert tensors[f"{prefix}.wide.shira_indices"].dtype == torch.int32
    again = PeftModel.from_pretrained(
        nn.ModuleDict({"small": nn.Linear(4, 6), "wide": nn.Linear(40_000, 2)}),
        tmp_path,
        config=ShiraConfig(r=1, target_modules=["small", "wide"], random_seed=3),
    )
    wide = again.base_model.model["wide"].shira_indices["default"]
    assert torch.equal(wide, tensors[f"{prefix}.wide.shira_indices"])


def test_modules_to_save_stay_as_they_are(tmp_path):
    config = ShiraConfig(
        r=1,
        target_modules=["lin1"],
        modules_to_save=["lin2"],
        random_seed=3,
        save_dtype="bfloat16",
    )
    get_peft_model(mlp(), config).save_pretrained(tmp_path)
    found = dtypes(tmp_path)
    assert found["shira_weight"] == torch.bfloat16
    assert found["weight"] == torch.float32


def test_a_value_that_the_dtype_cannot_hold(tmp_path):
    model = saved(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.base_model.model.lin1.shira_weight["default"][1] = 1e6
    model.peft_config["default"].save_dtype = "float16"
    with pytest.raises(AdapterError, match=r"lin1\.shira_weight.*1e\+06.*float16.*bfloat16"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_an_unknown_dtype():
    with pytest.raises(ConfigError, match=r"save_dtype.*'bfloat'.*Did you mean 'bfloat16'"):
        ShiraConfig(save_dtype="bfloat")


@pytest.mark.filterwarnings("ignore")
def test_stock_peft_loads_it(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    config = ShiraConfig(r=2, target_modules=["0", "2"], random_seed=1, save_dtype="bfloat16")
    model = get_peft_model(base, config)
    randomize(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    want = PeftModel.from_pretrained(base, tmp_path)(X)
    torch.save((X, want), tmp_path / "want.pt")
    code = f"""
import sys, torch
from peft import PeftModel
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 6))
model = PeftModel.from_pretrained(base, {str(tmp_path)!r})
assert type(model.base_model.model[0]).__module__ == "peft.tuners.shira.layer"
x, want = torch.load({str(tmp_path / "want.pt")!r})
torch.testing.assert_close(model(x), want)
assert "shira" not in sys.modules
"""
    program(code)
