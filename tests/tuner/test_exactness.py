# SPDX-License-Identifier: Apache-2.0
"""The one promise: whatever happened, the base weights are bit for bit what they were."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shira import ShiraConfig, get_peft_model

from .models import EVERYTHING, base_weights, everything, randomize, same_weights

ACTIONS = [
    "train",
    "evaluate",
    "activate",
    "activate both",
    "disable",
    "merge",
    "merge one",
    "unmerge",
    "rescale",
    "delete",
    "fail forward",
    "fail backward",
    "deepcopy",
]


class Boom(Exception):
    pass


def explode(*args):
    raise Boom


class Story:
    """A model with two adapters, to which things happen."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        base = everything(dtype=dtype)
        self.before = base_weights(base)
        config = ShiraConfig(density=0.2, target_modules=EVERYTHING, random_seed=1)
        self.model = get_peft_model(base, config, adapter_name="a")
        self.model.add_adapter(
            "b", ShiraConfig(density=0.3, target_modules=EVERYTHING, random_seed=2)
        )
        randomize(self.model)
        self.ids = torch.randint(11, (2, 4))

    @property
    def merged(self) -> bool:
        return any(getattr(m, "merged", False) for m in self.model.modules())

    def act(self, action: str) -> None:
        model, names = self.model, list(self.model.peft_config)
        if action == "train":
            model.train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            out = model(self.ids)
            if parameters and out.requires_grad:
                out.float().square().mean().backward()
                torch.optim.AdamW(parameters, lr=0.1).step()
        elif action == "evaluate":
            with torch.no_grad():
                model.eval()(self.ids)
        elif action == "activate":
            model.set_adapter(names[-1])
        elif action == "activate both":
            model.base_model.set_adapter(names)
        elif action == "disable":
            with model.disable_adapter():
                model(self.ids)
        elif action == "merge":
            model.merge_adapter()
        elif action == "merge one":
            model.merge_adapter([names[0]], safe_merge=True)
        elif action == "unmerge":
            model.unmerge_adapter()
        elif action == "rescale":
            for module in model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale(names[0], 0.5)
        elif action == "delete" and len(names) > 1 and not self.merged:
            model.delete_adapter(names[0])
        elif action == "fail forward":
            handle = model.base_model.model.conv1d.register_forward_hook(explode)
            with pytest.raises(Boom):
                model(self.ids)
            handle.remove()
        elif action == "fail backward":
            out = model(self.ids)
            if out.requires_grad:
                out.register_hook(explode)
                with pytest.raises(Boom):
                    out.float().sum().backward()
        elif action == "deepcopy":
            import copy

            self.model = copy.deepcopy(model)

    def base_is_whole(self) -> bool:
        return same_weights(base_weights(self.model), self.before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=10))
def test_the_base_comes_back(dtype, actions):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        story = Story(dtype)
        for action in actions:
            story.act(action)
            if not story.merged:
                assert story.base_is_whole(), action
        if story.merged:
            story.model.unmerge_adapter()
        assert story.base_is_whole()
        unloaded = story.model.unload()
        assert same_weights(base_weights(unloaded), story.before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_equals_unmerged_bit_for_bit(dtype):
    story = Story(dtype)
    model = story.model.eval()
    model.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        want = model(story.ids)
        model.merge_adapter()
        assert not story.base_is_whole()
        assert torch.equal(model(story.ids), want)
        model.unmerge_adapter()
        assert torch.equal(model(story.ids), want)
        merged = model.merge_and_unload()
    assert type(merged).__name__ == "Everything"
    assert torch.equal(merged(story.ids), want)


def test_merging_one_after_the_other_equals_merging_both_at_once():
    one, both = Story(torch.bfloat16), Story(torch.bfloat16)
    one.model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging"):
        one.model.merge_adapter(["b"])
    both.model.merge_adapter(["a", "b"])
    assert same_weights(base_weights(one.model), base_weights(both.model))
    one.model.unmerge_adapter()
    assert one.base_is_whole()


def test_moving_a_merged_model_between_dtypes():
    story = Story(torch.float32)
    story.model.merge_adapter()
    story.model.to(torch.bfloat16)
    story.model.unmerge_adapter()
    want = {name: value.to(torch.bfloat16) for name, value in story.before.items()}
    assert same_weights(base_weights(story.model), want)


@pytest.mark.parametrize("back", [False, True])
def test_laying_a_merged_model_out_anew_in_memory(back):
    torch.manual_seed(0)
    first, second = torch.contiguous_format, torch.channels_last
    if back:
        first, second = second, first
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=first)
    before = conv.weight.detach().clone()
    config = ShiraConfig(r=1, target_modules=["0"], init_weights=False)
    model = get_peft_model(torch.nn.Sequential(conv), config)
    model.add_adapter("b", config)
    merged = [adapted(model, names) for names in (["default"], ["default", "b"])]
    model.merge_adapter(["default"])
    model.to(memory_format=second)
    assert torch.equal(conv.weight, merged[0])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["b"])  # finds the originals below the first
    assert torch.equal(conv.weight, merged[1])
    model.unmerge_adapter()
    assert torch.equal(conv.weight, before)


def adapted(model, names):
    model.merge_adapter(names)
    weight = model.base_model.model[0].base_layer.weight.detach().clone()
    model.unmerge_adapter()
    return weight


def test_safe_merge_refuses_nan_and_changes_nothing():
    story = Story(torch.float32)
    layer = story.model.base_model.model.lin
    with torch.no_grad():
        layer.shira_weight["a"][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert story.base_is_whole()
    assert not layer.merged


def test_deleting_a_merged_adapter_of_a_layer_leaves_the_other_merged():
    story, other = Story(torch.float32), Story(torch.float32)
    layer, want = story.model.base_model.model.lin, other.model.base_model.model.lin
    layer.merge(adapter_names=["a", "b"])
    layer.delete_adapter("a")
    want.merge(adapter_names=["b"])
    assert torch.equal(layer.weight, want.weight)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, story.before["lin.weight"])


def test_a_graph_from_before_a_merge():
    """While merged its backward is refused, not wrong; unmerged it is right again."""
    story = Story(torch.float32)
    model = story.model
    values = model.base_model.model.lin.shira_weight["a"]
    want = torch.autograd.grad(model(story.ids).square().sum(), values)[0]
    loss = model(story.ids).square().sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, values, retain_graph=True)
    model.unmerge_adapter()
    assert torch.equal(torch.autograd.grad(loss, values)[0], want)
    model.base_model.set_adapter(["a", "b"])
    loss = model(story.ids).square().sum()
    want = torch.autograd.grad(loss, values, retain_graph=True)[0]
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, values, retain_graph=True)
    model.unmerge_adapter()
    assert torch.equal(torch.autograd.grad(loss, values)[0], want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["shira", "peft-shira", "peft-lora"])
def test_who_gives_the_base_back(kind):
    """The README's claim: PEFT undoes by subtraction, and the base drifts."""
    from peft import LoraConfig

    from .stock import stock_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    before = base[0].weight.detach().clone()
    if kind == "shira":
        model = get_peft_model(base, ShiraConfig(r=4, target_modules=["0"])).base_model
    elif kind == "peft-shira":
        model = stock_model(base, r=4, target_modules=["0"])
    else:
        config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(base, config).base_model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_weight" in name:
                parameter.normal_(std=0.01)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.model[0].get_base_layer().weight, before) == (kind == "shira")
