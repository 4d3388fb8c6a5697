# SPDX-License-Identifier: Apache-2.0
"""The base is the base, also while adapters are merged into it or a `Switch` has one in it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from shira import Adapter, PeftModel, ShiraConfig, Switch, calibrate, get_peft_model
from shira.errors import AdapterError, MergeError

from .models import EVERYTHING, base_weights, everything, llama, randomize, same_weights

X = torch.arange(12)[None]


def config(**options):
    return ShiraConfig(**{"density": 0.1, "target_modules": EVERYTHING, **options})


def first_half(base_layer, r, **_):
    """A mask of one's own that looks at the weight."""
    weight = base_layer.weight.detach()
    chosen = weight.flatten().abs().topk(round(0.1 * weight.numel())).indices
    return torch.zeros(weight.numel()).index_fill_(0, chosen, 1.0).view(weight.shape)


def own():
    chosen = config(mask_type="own")
    chosen.mask_fn = first_half
    return chosen


@pytest.fixture(params=["merged", "merged twice", "switched"])
def occupied(request):
    """A model with other values in its base, and the adapted model around it, if there is one."""
    model = everything(dtype=torch.bfloat16)
    if request.param == "switched":
        donor = get_peft_model(everything(dtype=torch.bfloat16), config(random_seed=1))
        randomize(donor, scale=3.0)
        switch = Switch(model)
        switch.load("a", Adapter.from_model(donor))
        switch.activate("a")
        model.switch = [switch]  # kept alive; a list, as no module is meant
        return model
    peft = get_peft_model(model, config(random_seed=1), adapter_name="one")
    peft.add_adapter("two", config(random_seed=2))
    randomize(peft, scale=3.0)
    peft.merge_adapter(["one"])
    if request.param == "merged twice":
        peft.merge_adapter(["two"])
    return peft


def add(model, chosen):
    if isinstance(model, PeftModel):
        model.add_adapter("new", chosen)
        return model, "new"
    return get_peft_model(model, chosen, adapter_name="new"), "new"


MAGNITUDE_BLOCKS = {"mask_type": "block", "mask_options": {"score": "magnitude", "block_size": 2}}


@pytest.mark.filterwarnings("ignore:Adapter cannot be set", "ignore:mask_type=")
@pytest.mark.parametrize(
    "make",
    [
        lambda: config(mask_type="magnitude"),
        lambda: config(**MAGNITUDE_BLOCKS),
        lambda: config(random_seed=3),
        own,
    ],
    ids=["magnitude", "block", "random", "own"],
)
def test_masks_and_fingerprints_are_of_the_base(occupied, make, tmp_path):
    plain = get_peft_model(everything(dtype=torch.bfloat16), make(), adapter_name="new")
    model, name = add(occupied, make())
    assert Adapter.from_model(model, name) == Adapter.from_model(plain, name)
    want = plain.peft_config[name].base_fingerprint
    assert model.peft_config[name].base_fingerprint == want
    assert Adapter.from_model(model, name).metadata["base_fingerprint"] == want


@pytest.mark.filterwarnings("ignore:Adapter cannot be set")
def test_loading_knows_the_right_base(occupied, tmp_path):
    donor = get_peft_model(everything(dtype=torch.bfloat16), config(random_seed=1))
    randomize(donor)
    donor.save_pretrained(tmp_path)
    if isinstance(occupied, PeftModel):
        occupied.load_adapter(tmp_path, "new")
    else:
        occupied = PeftModel.from_pretrained(occupied, tmp_path, "new")
    assert Adapter.from_model(occupied, "new") == Adapter.from_model(donor)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set")
def test_saving_while_merged(tmp_path):
    model = get_peft_model(everything(), config(random_seed=1))
    randomize(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    again = PeftModel.from_pretrained(everything(), tmp_path)
    assert torch.equal(again(X % 11), model(X % 11))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["merged", "switched"])
def test_the_copy_of_the_embeddings_that_peft_saves(tmp_path, how):
    chosen = {"density": 0.1, "target_modules": ["embed_tokens"]}
    model = get_peft_model(llama(), ShiraConfig(random_seed=1, **chosen)).eval()
    randomize(model)
    want = model(X).logits
    if how == "merged":
        model.merge_adapter()
    else:
        switch = Switch(model)
        switch.load("a", Adapter.from_model(model))
        switch.activate("a")
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path).eval()(X).logits, want)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    copied = stored["base_model.model.model.embed_tokens.base_layer.weight"]
    assert torch.equal(copied, llama().model.embed_tokens.weight)


def test_a_switch_that_lets_go_leaves_no_trace():
    model = llama()
    chosen = {"density": 0.1, "target_modules": ["q_proj"]}
    donor = get_peft_model(llama(), ShiraConfig(random_seed=1, **chosen))
    randomize(donor, scale=3.0)
    switch = Switch(model)
    switch.load("a", Adapter.from_model(donor))
    switch.activate("a")
    switch.rebase()  # what is in the weights is the base now
    changed = llama()
    changed.load_state_dict(model.state_dict())
    made, want = (
        get_peft_model(m, ShiraConfig(mask_type="magnitude", **chosen)) for m in (model, changed)
    )
    assert Adapter.from_model(made) == Adapter.from_model(want)
    found, expected = (m.peft_config["default"].base_fingerprint for m in (made, want))
    assert found == expected


def two(seed=1):
    """Two models with adapters of other positions and values."""
    chosen = {"r": 1, "target_modules": ["q_proj"]}
    source = get_peft_model(llama(), ShiraConfig(random_seed=seed, **chosen)).eval()
    target = get_peft_model(llama(), ShiraConfig(random_seed=9, **chosen)).eval()
    randomize(source, 3)
    randomize(target, 4)
    return source, target


def by_load_state_dict(source, target, path):
    target.load_state_dict(source.state_dict())


def by_merged_state_dict(source, target, path):
    """A checkpoint of a merged model holds merged weights."""
    target.load_state_dict(source.state_dict())
    state = {key: value.clone() for key, value in target.state_dict().items()}
    target.load_state_dict(state)


def by_set_peft_model_state_dict(source, target, path):
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))


def by_load_adapter(source, target, path):
    source.save_pretrained(path)
    target.load_adapter(path, "default")


@pytest.mark.parametrize(
    "way",
    [by_load_state_dict, by_merged_state_dict, by_set_peft_model_state_dict, by_load_adapter],
)
def test_loading_over_a_merged_adapter(way, tmp_path):
    source, target = two()
    target.merge_adapter()
    way(source, target, tmp_path)
    want = source(X).logits
    layers = [m for m in target.modules() if hasattr(m, "shira_weight")]
    assert all(layer.merged_adapters == ["default"] for layer in layers)
    assert torch.equal(target(X).logits, want)
    target.unmerge_adapter()
    assert torch.equal(target(X).logits, want)
    assert same_weights(base_weights(target), base_weights(llama()))


@pytest.mark.filterwarnings("ignore:Adapter cannot be set")
def test_loading_beside_a_merged_adapter_leaves_it(tmp_path):
    source, target = two()
    target.add_adapter("other", ShiraConfig(r=1, target_modules=["q_proj"], random_seed=1))
    target.merge_adapter()
    before = base_weights(target)
    set_peft_model_state_dict(target, get_peft_model_state_dict(source), "other")
    assert same_weights(base_weights(target), before)


def test_a_scale_acts_on_a_merged_adapter():
    model, _ = two()
    layers = [layer for layer in model.modules() if hasattr(layer, "set_scale")]
    for layer in layers:
        layer.set_scale("default", 0.5)
    want = model(X).logits
    for layer in layers:
        layer.set_scale("default", 2.0)
    model.merge_adapter()
    for layer in layers:
        layer.set_scale("default", 0.5)
        assert layer.merged_adapters == ["default"]
    assert torch.equal(model(X).logits, want)
    model.unmerge_adapter()
    assert same_weights(base_weights(model), base_weights(llama()))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 10**400, True, "1", None])
@pytest.mark.parametrize("merged", [False, True])
def test_a_scale_that_is_none_is_refused_and_changes_nothing(scale, merged):
    model, _ = two()
    if merged:
        model.merge_adapter()
    before, want = base_weights(model), model(X).logits
    layer = next(layer for layer in model.modules() if hasattr(layer, "set_scale"))
    with pytest.raises(AdapterError, match="the scale of 'default' is"):
        layer.set_scale("default", scale)
    assert same_weights(base_weights(model), before)
    assert torch.equal(model(X).logits, want)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set")
def test_a_weighted_adapter_of_merged_ones():
    chosen = {"r": 1, "target_modules": ["q_proj"]}
    made = []
    for merged in (False, True):
        model = get_peft_model(llama(), ShiraConfig(random_seed=1, **chosen), adapter_name="one")
        model.add_adapter("two", ShiraConfig(random_seed=2, **chosen))
        randomize(model)
        if merged:
            model.merge_adapter(["one", "two"])
        model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both")
        made.append(Adapter.from_model(model, "both"))
    assert made[0] == made[1]
    assert made[0].metadata == made[1].metadata


def test_calibration_wants_the_base():
    model, other = two()
    model.merge_adapter()
    chosen = ShiraConfig(r=1, target_modules=["v_proj"], mask_type="grad")
    batches = [{"input_ids": X, "labels": X}]
    with pytest.raises(MergeError, match=r"q_proj.*merged into the weight.*unmerge_adapter"):
        calibrate(model, chosen, batches)
    base = llama()
    switch = Switch(base)
    switch.load("a", Adapter.from_model(other))
    switch.activate("a")
    with pytest.raises(MergeError, match=r"q_proj: a shira.Switch.*deactivate"):
        calibrate(base, chosen, batches)
    switch.deactivate()
    calibrate(base, chosen, batches)
