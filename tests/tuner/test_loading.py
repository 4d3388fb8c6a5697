# SPDX-License-Identifier: Apache-2.0
"""Saving and loading through PEFT, and files that must leave the model as it was."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from shira import Adapter, PeftModel, ShiraConfig, ShiraError, get_peft_model
from shira.errors import FileFormatError, WrongBaseError
from tests.forked import program

from .models import EVERYTHING, base_weights, everything, mlp, randomize, same_weights

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = "base_model.model.lin1.shira_weight"
INDICES = "base_model.model.lin1.shira_indices"


def saved(path, **options):
    """A trained adapter on disk, and the model it belongs to."""
    config = ShiraConfig(
        **{"r": 2, "target_modules": ["lin1", "lin2"], "random_seed": 3, **options}
    )
    model = get_peft_model(mlp(), config).eval()
    randomize(model)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_and_load_adapter(tmp_path, low_cpu_mem_usage):
    model = saved(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(again(X), model(X))
    assert not any(p.requires_grad for p in again.parameters())
    result = again.load_adapter(
        tmp_path, "other", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert result.missing_keys == []
    again.set_adapter("other")
    assert torch.equal(again(X), model(X))
    assert not any(p.is_meta for p in again.parameters())


def test_layers_of_every_kind(tmp_path):
    config = ShiraConfig(density=0.2, target_modules=EVERYTHING)
    model = get_peft_model(everything(), config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    ids = torch.randint(11, (2, 4))
    again = PeftModel.from_pretrained(everything(), tmp_path).eval()
    assert torch.equal(again(ids), model(ids))
    adapter = Adapter.load(tmp_path)
    assert adapter == Adapter.from_model(model)
    assert adapter["conv.weight"].support.shape == (3, 1, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_dtype_is_no_wrong_base(tmp_path, dtype):
    saved(tmp_path)
    model = PeftModel.from_pretrained(mlp(dtype=dtype), tmp_path)
    assert model(X.to(dtype)).dtype == dtype


def test_int16_indices_and_bf16_values_are_read(tmp_path):
    model = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    small = {
        key: value.to(torch.int16 if "indices" in key else torch.bfloat16)
        for key, value in load_file(file).items()
    }
    save_file(small, file)
    again = PeftModel.from_pretrained(mlp(), tmp_path).base_model.model.lin1
    layer = model.base_model.model.lin1
    assert again.shira_indices["default"].dtype == torch.int32
    assert torch.equal(again.shira_indices["default"], layer.shira_indices["default"])
    assert torch.equal(
        again.shira_weight["default"], layer.shira_weight["default"].bfloat16().float()
    )


def test_an_adapter_of_any_count_loads(tmp_path):
    """Extracted and fused adapters have another count in each layer."""
    model = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[WEIGHTS], tensors[INDICES] = tensors[WEIGHTS][:5], tensors[INDICES][:, :5].contiguous()
    save_file(tensors, file)
    config = ShiraConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None  # it is of the entries that were there
    again = PeftModel.from_pretrained(mlp(), tmp_path, config=config)
    assert again.base_model.model.lin1.shira_weight["default"].numel() == 5
    want = model.base_model.model.lin1.get_delta_weight("default").to_dense()
    got = again.base_model.model.lin1.get_delta_weight("default").to_dense()
    assert torch.equal(got[got != 0], want[got != 0])


@pytest.mark.parametrize("mask_type", ["grad", "own"])
@pytest.mark.filterwarnings("ignore:mask_type")
def test_a_mask_that_cannot_be_made_again_loads(tmp_path, mask_type):
    model = saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_type": mask_type}))
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path).eval()(X), model(X))


def test_wrong_base(tmp_path):
    saved(tmp_path)
    other = mlp(seed=1)
    before = base_weights(other)
    with pytest.raises(WrongBaseError, match=r"adapter_model\.safetensors.*lin[12]\.weight"):
        PeftModel.from_pretrained(other, tmp_path)
    assert type(other.lin1) is nn.Linear
    assert same_weights(base_weights(other), before)
    config = ShiraConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    PeftModel.from_pretrained(other, tmp_path, config=config)(X)


def test_a_config_of_ones_own_goes_before_the_files(tmp_path):
    saved(tmp_path)
    config = ShiraConfig(r=2, target_modules=["lin1", "lin2"], random_seed=3)
    PeftModel.from_pretrained(mlp(seed=1), tmp_path, config=config)


def test_a_file_without_shapes_has_the_targets_of_its_config(tmp_path):
    saved(tmp_path)
    path, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(file)
    path.write_text(json.dumps({**config, "shira_shapes": None, "target_modules": ["lin2"]}))
    with pytest.raises(FileFormatError, match=r"unknown target: 'lin1\.weight' is in the file"):
        PeftModel.from_pretrained(mlp(), tmp_path)
    path.write_text(json.dumps({**config, "shira_shapes": None}))
    save_file({key: t for key, t in tensors.items() if "lin1" not in key}, file)
    with pytest.raises(FileFormatError, match=r"missing target: .* name 'lin1\.weight'"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_state_dict_of_the_whole_model_with_another_adapter(tmp_path):
    model = saved(tmp_path)
    other = PeftModel.from_pretrained(mlp(), tmp_path)
    for each in (model, other):
        each.add_adapter("another", ShiraConfig(r=1, target_modules=["lin2"], random_seed=5))
    randomize(model)
    set_peft_model_state_dict(other, model.state_dict(), "another")
    want, got = (get_peft_model_state_dict(each, adapter_name="another") for each in (model, other))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_wrong_base_under_a_name_that_is_there(tmp_path):
    model = saved(tmp_path / "right")
    want = model(X)
    other = get_peft_model(mlp(seed=1), ShiraConfig(r=2, target_modules=["lin1", "lin2"])).eval()
    randomize(other, 5)
    other.save_pretrained(tmp_path / "wrong")
    with pytest.raises(WrongBaseError, match=r"lin[12]\.weight"):
        model.load_adapter(tmp_path / "wrong", "default")
    assert torch.equal(model(X), want)
    randomize(model, 7)
    model.load_adapter(tmp_path / "right", "new")
    with pytest.raises(WrongBaseError, match=r"lin[12]\.weight"):
        model.load_adapter(tmp_path / "wrong", "new")
    model.load_adapter(tmp_path / "right", "default")
    assert torch.equal(model(X), want)
    config = ShiraConfig.from_pretrained(tmp_path / "right")
    with pytest.raises(WrongBaseError, match=r"lin[12]\.weight"):
        get_peft_model(mlp(), config).load_adapter(tmp_path / "wrong", "default")
    (tmp_path / "right" / "adapter_config.json").unlink()  # which PEFT does not read then
    randomize(model, 7)
    model.load_adapter(tmp_path / "right", "default")
    assert torch.equal(model(X), want)


def test_an_untrained_adapter_fits_every_base(tmp_path):
    get_peft_model(mlp(), ShiraConfig(r=1, target_modules=["lin1"])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(mlp(seed=1), tmp_path)


def set_tensor(key, change):
    def spoil(path):
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        new = change(tensors[key].clone())
        tensors.pop(key)
        if new is not None:
            tensors[key] = new
        save_file(tensors, file)

    return spoil


def at(where, value):
    def change(tensor):
        tensor[where] = value
        return tensor

    return change


def write(data):
    return lambda path: (path / "adapter_model.safetensors").write_bytes(data)


def truncate(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def rename(path):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("lin1", "lin7"): value for key, value in tensors.items()}, file)


def drop(path):
    file = path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lin1" not in k}, file)


HOSTILE = {
    "row out of range": (set_tensor(INDICES, at((0, -1), 12)), [INDICES, "row", "12"]),
    "column out of range": (set_tensor(INDICES, at((1, -1), 400)), [INDICES, "column", "400"]),
    "negative index": (set_tensor(INDICES, at((0, 0), -1)), [INDICES, "negative"]),
    "overflowing index": (
        set_tensor(INDICES, lambda t: at((0, 0), 2**62)(t.long())),
        [INDICES],
    ),
    "repeated index": (set_tensor(INDICES, lambda t: at((slice(None), 1), t[:, 0])(t)), [INDICES]),
    "one value too few": (set_tensor(WEIGHTS, lambda t: t[:-1].clone()), ["lin1"]),
    "values of two dimensions": (set_tensor(WEIGHTS, lambda t: t[None].clone()), [WEIGHTS]),
    "indices of three rows": (
        set_tensor(INDICES, lambda t: torch.cat((t, t[:1]))),
        [INDICES, "(3, 48)"],
    ),
    "integer values": (set_tensor(WEIGHTS, lambda t: t.int()), [WEIGHTS, "I32"]),
    "fractional indices": (set_tensor(INDICES, lambda t: t + 0.5), [INDICES]),
    "NaN": (set_tensor(WEIGHTS, at(3, float("nan"))), [WEIGHTS, "finite"]),
    "infinity": (set_tensor(WEIGHTS, at(3, float("-inf"))), [WEIGHTS, "finite"]),
    "no indices": (set_tensor(INDICES, lambda t: None), ["lin1", "shira_indices"]),
    "no values": (set_tensor(WEIGHTS, lambda t: None), ["lin1", "shira_weight"]),
    "truncated": (truncate, ["truncated"]),
    "empty": (write(b""), []),
    "pickle": (write(b"\x80\x04\x95" + bytes(100)), ["pickle"]),
    "zip archive": (write(b"PK\x03\x04" + bytes(100)), []),
    "unknown target": (rename, ["lin7.weight"]),
    "missing target": (drop, ["lin1.weight", "missing"]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_leave_the_model_as_it_was(tmp_path, kind):
    saved(tmp_path)
    spoil, words = HOSTILE[kind]
    spoil(tmp_path)
    model = mlp()
    before, layers = base_weights(model), dict(model.named_modules())
    with pytest.raises(ShiraError) as caught:
        PeftModel.from_pretrained(model, tmp_path)
    message = str(caught.value)
    assert isinstance(caught.value, FileFormatError)
    assert "adapter_model.safetensors" in message
    assert all(word in message for word in words), message
    assert dict(model.named_modules()) == layers
    assert same_weights(base_weights(model), before)


@pytest.mark.parametrize("kind", ["row out of range", "NaN", "missing target"])
def test_a_hostile_second_adapter_leaves_the_first(tmp_path, kind):
    saved(tmp_path / "good")
    saved(tmp_path / "bad")
    HOSTILE[kind][0](tmp_path / "bad")
    model = PeftModel.from_pretrained(mlp(), tmp_path / "good").eval()
    want = model(X)
    with pytest.raises(ShiraError):
        model.load_adapter(tmp_path / "bad", "bad")
    assert torch.equal(model(X), want)
    assert list(model.peft_config) == ["default"]
    assert model.base_model.model.lin1._all_available_adapter_names() == ["default"]


@pytest.mark.parametrize("kind", ["row out of range", "NaN", "repeated index", "one value too few"])
def test_state_dicts_that_come_another_way_are_checked_too(tmp_path, kind):
    from peft import set_peft_model_state_dict

    model = saved(tmp_path)
    HOSTILE[kind][0](tmp_path)
    want = model(X)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileFormatError, match="lin1"):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(model(X), want)


@pytest.mark.filterwarnings("ignore")
def test_rows_out_of_range_as_pefts_own_shira_takes_them(tmp_path):
    """The README's claim: stock PEFT accepts what we refuse (it fails, if at all, when it runs)."""
    saved(tmp_path)
    HOSTILE["row out of range"][0](tmp_path)
    code = f"""
from torch import nn
from peft import PeftModel
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(12, 12, bias=False), nn.Linear(12, 6)
PeftModel.from_pretrained(MLP(), {str(tmp_path)!r})
"""
    program(code)


@pytest.mark.parametrize(
    ("of", "change", "words"),
    [
        (INDICES, lambda t: t + 0.5, "no whole number"),
        (INDICES, lambda t: t + 100, "outside a weight"),
        (INDICES, lambda t: t[:, 1:], "do not fit"),
        (WEIGHTS, lambda t: t / 0, "not finite"),
    ],
)
def test_an_unusable_state_dict_is_refused_by_the_name_of_its_tensor(of, change, words):
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"], random_seed=3))
    randomize(model)
    state = get_peft_model_state_dict(model)
    expected = model(X)
    with pytest.raises(FileFormatError, match=rf"{of}\.default: .*{words}"):
        set_peft_model_state_dict(model, {**state, of: change(state[of])})
    assert torch.equal(model(X), expected)
