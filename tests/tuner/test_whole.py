# SPDX-License-Identifier: Apache-2.0
"""Modules that are trained whole beside an adapter: equal outputs wherever the adapter goes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import TaskType
from safetensors.torch import load_file, save_file
from torch import nn

from shira import Adapter, PeftModel, ShiraConfig, Switch, fuse, get_peft_model
from shira.convert import merge, unmerge
from shira.errors import AdapterError, FileFormatError, MergeError, TargetError, WrongBaseError
from tests.tuner.models import llama, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
IDS = torch.arange(12).view(2, 6)


class Normed(nn.Module):
    """A head with buffers, floating and counting."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(torch.relu(self.lin(x.float())))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


CASES = {
    "lm_head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "half": (
        lambda: llama().bfloat16(),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "classifier": (bert, {"target_modules": ["query"], "task_type": TaskType.SEQ_CLS}),
    "buffers": (Normed, {"target_modules": ["lin"], "modules_to_save": ["head"]}),
    "embedding beside": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "embedding adapted": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
}


def outputs(model, ids=IDS):
    with torch.no_grad():
        found = model.eval()(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def trained(make, options, seed=1):
    """A PEFT model whose values and whole modules have been filled."""
    model = get_peft_model(make(), ShiraConfig(r=1, random_seed=seed, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_weight" in name or ".modules_to_save." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
        if make is Normed:
            model.train()(torch.randn(9, 6, generator=generator))
    return model.eval()


def save_base(model, folder):
    """The base, alone or as transformers saves it, and the file that holds it."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder, folder / "model.safetensors"
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path)
    return path, path


@pytest.mark.parametrize("case", CASES)
def test_equal_outputs_wherever_the_adapter_goes(case, tmp_path):
    make, options = CASES[case]
    model, base = trained(make, options), make().eval()
    before, expected = copy.deepcopy(base.state_dict()), outputs(model)
    assert not torch.equal(outputs(base), expected)
    model.save_pretrained(tmp_path / "saved")
    adapter = Adapter.load(tmp_path / "saved")
    assert adapter == Adapter.from_model(model)
    adapter.save(tmp_path / "compact.safetensors")
    adapter.save(tmp_path / "peft", "peft")
    forms = {
        "saved": tmp_path / "saved",
        "compact": tmp_path / "compact.safetensors",
        "peft": tmp_path / "peft",
        "fused": fuse([adapter]),
        "with nothing": adapter + Adapter({}),
    }
    switch = Switch(base)
    for name, form in forms.items():
        switch.load(name, form)
        with switch.using(name):
            assert torch.equal(outputs(base), expected)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())

    again = PeftModel.from_pretrained(make(), tmp_path / "peft")
    assert torch.equal(outputs(again), expected)
    assert torch.equal(outputs(again.merge_and_unload()), expected)

    path, file = save_base(base, tmp_path / "base")
    undo, out, back = (tmp_path / name for name in ("undo", f"out{path.suffix}", f"b{path.suffix}"))
    merge(tmp_path / "compact.safetensors", path, out, undo=undo)
    merged = make()
    merged.load_state_dict(load_file(out / file.name if out.is_dir() else out))
    assert torch.equal(outputs(merged), expected)
    unmerge(out, undo, back)
    assert (back / file.name if back.is_dir() else back).read_bytes() == file.read_bytes()


def test_a_head_of_labels_that_the_base_has_not(tmp_path):
    make, options = CASES["classifier"]
    trained(make, options).save_pretrained(tmp_path / "saved")
    other = bert()
    other.classifier = nn.Linear(16, 2)
    with pytest.raises(WrongBaseError, match=r"made for a 'classifier.\w+' of shape \(3,"):
        Switch(other).load("a", tmp_path / "saved")
    with pytest.raises(WrongBaseError, match=r"made for a 'classifier.\w+' of shape \(3,"):
        PeftModel.from_pretrained(other, tmp_path / "saved")
    assert not any("modules_to_save" in name for name, _ in other.named_modules())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("base_model.model.lin2.bias"), "modules_to_save name 'lin2'.* its 'bias'"),
        (
            lambda t: t.update({"base_model.model.lin3.weight": torch.ones(2)}),
            r"whole of 'lin3.weight', but the base.*Did you mean 'lin",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_before_the_model_changes(tmp_path, change, match):
    options = {"target_modules": ["lin1"], "modules_to_save": ["lin2"]}
    trained(mlp, options).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    model = mlp()
    with pytest.raises(FileFormatError, match=match):
        PeftModel.from_pretrained(model, tmp_path)
    assert all(re.fullmatch(r"lin\d|", name) for name, _ in model.named_modules())


def test_a_second_adapter_with_the_same_module(tmp_path):
    make, options = CASES["lm_head"]
    first, second = trained(make, options), trained(make, options, seed=2)
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    model = PeftModel.from_pretrained(make(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    for name, source in (("a", first), ("b", second)):
        model.set_adapter(name)
        assert torch.equal(outputs(model), outputs(source))
        assert Adapter.from_model(model, name) == Adapter.from_model(source)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["k_proj"]}, {"modules_to_save": ["self_attn"]}),
        ({"target_parameters": ["k_proj.weight"]}, {"modules_to_save": ["self_attn"]}),
        ({"modules_to_save": ["self_attn"]}, {"target_modules": ["k_proj"]}),
        ({"modules_to_save": ["self_attn"]}, {"target_parameters": ["k_proj.weight"]}),
    ],
)
def test_nothing_is_adapted_inside_a_module_that_is_trained_whole(first, second):
    """Such a model was made, and could not be saved."""
    base = {"target_modules": ["lm_head"], "r": 2}
    model = get_peft_model(llama(), ShiraConfig(**base | first))
    with pytest.raises(TargetError, match=r"self_attn'.* is trained whole"):
        model.add_adapter("b", ShiraConfig(**base | second))
    assert [*model.peft_config] == ["default"]
    both = {"target_parameters": ["k_proj.weight"], "modules_to_save": ["self_attn"]}
    with pytest.raises(TargetError, match=r"k_proj.weight' is adapted.* is trained whole"):
        get_peft_model(llama(), ShiraConfig(**base | both))


def test_a_switch_is_for_the_base_and_not_for_copies_of_peft():
    model = trained(mlp, {"target_modules": ["lin1"], "modules_to_save": ["lin2"]})
    switch = Switch(model)
    with pytest.raises(AdapterError, match=r"'lin2.\w+' is in a module of which PEFT keeps copies"):
        switch.load("a", Adapter.from_model(model))


def test_the_head_of_a_tied_model_is_refused_where_it_would_change_the_embedding(tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = trained(lambda: llama(tie_word_embeddings=True), options)
    model.save_pretrained(tmp_path / "a")
    base = llama(tie_word_embeddings=True)
    with pytest.raises(TargetError, match=r"'lm_head.weight' shares its memory with 'model.emb"):
        Switch(base).load("a", tmp_path / "a")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match=r"'lm_head.weight' is not in the checkpoint: it is tied"):
        merge(tmp_path / "a", tmp_path / "base", tmp_path / "out")


def test_weighted_adapters_take_the_module_of_the_one_that_has_it():
    model = trained(mlp, {"target_modules": ["lin1"], "modules_to_save": ["lin2"]})
    model.add_adapter("plain", ShiraConfig(r=1, random_seed=2, target_modules=["lin1"]))
    model.base_model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "both", "linear")
    both, head = (Adapter.from_model(model, name).tensors for name in ("both", "default"))
    assert both.keys() == {"lin2.weight", "lin2.bias"}
    assert all(torch.equal(both[name], head[name]) for name in head)
