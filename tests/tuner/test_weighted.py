# SPDX-License-Identifier: Apache-2.0
"""``add_weighted_adapter``: the result is that of `fuse`, and an adapter like any other."""

from __future__ import annotations

import warnings

import pytest
import torch

from shira import Adapter, PeftModel, ShiraConfig, fuse, get_peft_model
from shira.errors import AdapterError, ConfigError, UnknownAdapterError
from tests.forked import program

from .models import EVERYTHING, base_weights, everything, llama, mlp, randomize, same_weights

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
METHODS = {
    "linear": ("sum", {}),
    "ties": ("ties", {"density": 0.6}),
    "dare_linear": ("dare", {"density": 0.6, "seed": 4}),
    "dare_ties": ("dare_ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    "magnitude_prune": ("magnitude_prune", {"density": 0.4}),
    "della": ("della", {"density": 0.6, "epsilon": 0.2}),
    "magnitude": ("magnitude", {"k": 50}),
}


pytestmark = pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained")


def model_of(net, *targets, r=2, scale=0.3):
    """Adapters "a", "b", ... of different seeds and targets."""
    for number, names in enumerate(targets):
        config = ShiraConfig(r=r, target_modules=names, random_seed=number + 1)
        if number == 0:
            model = get_peft_model(net, config, adapter_name="a")
        else:
            model.add_adapter("abc"[number], config)
    randomize(model, scale=scale)
    return model.eval()


def two(net=None):
    return model_of(mlp() if net is None else net, ["lin1", "lin2"], ["lin1"])


def without_zeros(adapter: Adapter) -> Adapter:
    return adapter.prune(sum(int((d.values != 0).sum()) for d in adapter.values()))


@pytest.mark.parametrize("combination", METHODS)
def test_the_same_as_fuse(combination):
    model = two()
    method, options = METHODS[combination]
    parts = [Adapter.from_model(model, name) for name in "ab"]
    expected = fuse(parts, [0.7, -0.2], method, **options)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.2], "ab", combination, **options)
    found = Adapter.from_model(model, "ab")
    assert without_zeros(found) == without_zeros(expected)
    assert found.compare(expected).largest_difference == 0
    assert found.metadata["fused"]["method"] == method


def test_an_adapter_like_any_other(tmp_path):
    model = two()
    base = base_weights(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "ab")
    assert model.active_adapters == ["a"]
    model.base_model.set_adapter(["a", "b"])
    for layer in (model.base_model.model.lin1, model.base_model.model.lin2):
        layer.set_scale("a", 0.5)
        layer.set_scale("b", 2.0)
    expected = model(X)
    model.set_adapter("ab")
    torch.testing.assert_close(model(X), expected)
    merged = model(X)
    model.merge_adapter()
    assert torch.equal(model(X), merged)
    model.unmerge_adapter()
    assert same_weights(base_weights(model), base)
    model.save_pretrained(tmp_path, selected_adapters=["ab"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(mlp(), tmp_path / "ab").eval()
    assert torch.equal(again(X), merged)
    trained_on = PeftModel.from_pretrained(mlp(), tmp_path / "ab", is_trainable=True)
    trained_on(X).sum().backward()
    assert all(p.grad is not None for n, p in trained_on.named_parameters() if "shira_weight" in n)
    assert Adapter.load(tmp_path / "ab") == Adapter.from_model(model, "ab")
    assert again.peft_config["default"].fused == model.peft_config["ab"].fused
    model.delete_adapter("ab")
    assert not any("ab" in name for name, _ in model.named_parameters())


def test_frozen_until_it_is_activated_and_then_it_trains():
    model = two()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["a", "b"], [1, 1], "a2")  # a name with that of another in it
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    model.set_adapter("a2")
    model(X).square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith(".a2")]
    assert len(gradients) == 2
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_config_counts_as_peft_does():
    model = two()
    model.add_weighted_adapter(["a", "b"], [1, 1], "ab")
    config = model.peft_config["ab"]
    assert (config.r, config.mask_type, config.random_seed) == (4, "fused", None)
    for name, layer in (("lin1", 12 + 12), ("lin2", 12 + 6)):
        assert model.base_model.model.get_submodule(name).shira_weight["ab"].numel() == 4 * layer
    assert config.target_modules == {"lin1", "lin2"}
    assert set(config.base_fingerprint) == {"lin1.weight", "lin2.weight"}


def test_model_and_task_are_those_of_the_first_adapter():
    first = ShiraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM", revision="main")
    model = get_peft_model(llama(), first, adapter_name="a")
    model.add_adapter("b", ShiraConfig(r=1, target_modules=["v_proj"]))
    model.add_weighted_adapter(["a", "b"], [1, 1], "ab")
    for field in ("task_type", "revision", "base_model_name_or_path"):
        assert getattr(model.peft_config["ab"], field) == getattr(model.peft_config["a"], field)
    assert model.peft_config["ab"].task_type == "CAUSAL_LM"


def test_one_mask_stays_that_mask():
    config = ShiraConfig(r=2, target_modules=["lin1"], random_seed=3)
    model = get_peft_model(mlp(), config, adapter_name="a")
    model.add_adapter("b", ShiraConfig(r=2, target_modules=["lin1"], random_seed=3))
    randomize(model)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "ab")
    fused = model.peft_config["ab"]
    assert (fused.mask_type, fused.random_seed, fused.r) == ("random", 3, 2)
    assert Adapter.from_model(model, "ab") == fuse(
        [Adapter.from_model(model, name) for name in "ab"], [0.5, 0.5]
    )


def test_slots_fit_without_filling_up():
    config = {"r": 1, "target_modules": ["lin1", "lin2"], "random_seed": 3}
    model = get_peft_model(mlp(), ShiraConfig(**config), adapter_name="a")
    model.add_adapter("b", ShiraConfig(**config, mask_slot=1))
    randomize(model)
    model.add_weighted_adapter(["a", "b"], [1, 1], "ab")
    assert model.peft_config["ab"].r == 2
    parts = [Adapter.from_model(model, name) for name in "ab"]
    assert Adapter.from_model(model, "ab") == fuse(parts)


def test_where_no_rank_has_room_nothing_is_filled_up(tmp_path):
    """lin2 is 6 x 12: r = 4 fills it, and two masks of r = 3 have more than r = 3."""
    model = model_of(mlp(), ["lin2"], ["lin2"], ["lin2"], r=3)
    model.add_weighted_adapter(["a", "b", "c"], [1, 1, 1], "abc")
    layer = model.base_model.model.lin2
    assert layer.shira_weight["abc"].numel() > 3 * 18
    assert model.peft_config["abc"].r == layer.r["abc"] == 4
    model.set_adapter("abc")
    model.save_pretrained(tmp_path, selected_adapters=["abc"])
    again = PeftModel.from_pretrained(mlp(), tmp_path / "abc").eval()
    assert torch.equal(again(X), model(X))


def test_scales_count():
    model = two()
    model.base_model.model.lin1.set_scale("a", 3.0)
    model.add_weighted_adapter(["a"], [1.0], "scaled")
    a = Adapter.from_model(model, "a")
    found = without_zeros(Adapter.from_model(model, "scaled"))
    assert found["lin1.weight"].values.tolist() == (a["lin1.weight"].values * 3).tolist()
    assert found["lin2.weight"] == a["lin2.weight"]


def test_one_adapter_at_weight_one_is_a_copy():
    model = two()
    model.add_weighted_adapter(["a"], [1.0], "again", "ties")
    assert Adapter.from_model(model, "again") == Adapter.from_model(model, "a")
    layer = model.base_model.model.lin1
    assert layer.shira_weight["again"].data_ptr() != layer.shira_weight["a"].data_ptr()


def test_every_layer_type():
    ids = torch.arange(8).view(2, 4)
    model = model_of(everything(), ["emb", "conv", "volume", "back"], EVERYTHING[1:], r=1)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "ab")
    model.base_model.set_adapter(["a", "b"])
    expected = model(ids)
    model.set_adapter("ab")
    torch.testing.assert_close(model(ids), expected)


def test_targets_are_named_exactly():
    model = model_of(llama(), r".*layers\.0\.self_attn\.(q|v)_proj", ["up_proj"], r=1)
    model.add_weighted_adapter(["a", "b"], [1, 1], "ab")
    named = set(Adapter.from_model(model, "ab"))
    assert named == {name for part in "ab" for name in Adapter.from_model(model, part)}
    model.add_weighted_adapter(["b"], [2], "b2")
    assert model.peft_config["b2"].target_modules == {"up_proj"}


def test_a_name_that_is_the_end_of_another_is_an_expression():
    net = torch.nn.ModuleDict(
        {"x": torch.nn.Linear(6, 6), "in": torch.nn.ModuleDict({"x": torch.nn.Linear(6, 6)})}
    )
    model = get_peft_model(net, ShiraConfig(r=1, target_modules="x", random_seed=1), "a")
    model.add_adapter("b", ShiraConfig(r=1, target_modules="x", random_seed=2))
    model.add_weighted_adapter(["a", "b"], [1, 1], "ab")
    assert set(Adapter.from_model(model, "ab")) == {"x.weight"}
    model.peft_config["b"].target_modules = "unlike"  # so that the configs' own does not do
    model.peft_config["a"].target_modules = "unlike"
    model.add_weighted_adapter(["a", "b"], [1, 1], "by_name")
    assert set(Adapter.from_model(model, "by_name")) == {"x.weight"}


def test_a_module_that_one_adapter_trains_whole_comes_along():
    config = ShiraConfig(r=1, target_modules=["lin1"], modules_to_save=["lin2"], random_seed=1)
    model = get_peft_model(mlp(), config, adapter_name="a")
    model.add_adapter("b", ShiraConfig(r=1, target_modules=["lin1"], random_seed=2))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.lin2.modules_to_save["a"].weight.add_(1.0)
    model.add_weighted_adapter(["a", "b"], [1, 1], "ab")
    head = model.base_model.model.lin2.modules_to_save
    assert torch.equal(head["ab"].weight, head["a"].weight)
    assert head["ab"].weight.data_ptr() != head["a"].weight.data_ptr()
    assert model.peft_config["ab"].modules_to_save == ["lin2"]
    with pytest.raises(AdapterError, match="'lin2' is trained whole by 'a' and 'ab'"):
        model.add_weighted_adapter(["a", "ab"], [1, 1], "c")


def test_mistakes_change_nothing():
    model = two()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for error, message, arguments in [
        (UnknownAdapterError, "Adapter aa does not exist", (["aa"], [1], "x")),
        (AdapterError, "an adapter 'b' already", (["a"], [1], "b")),
        (ConfigError, "Did you mean 'linear'", (["a"], [1], "x", "liner")),
        (ConfigError, "'linear' is the exact sum", (["a"], [1], "x", "svd")),
        (ConfigError, "2 adapters need as many weights", (["a", "b"], [1], "x")),
        (ConfigError, "a list of names", ("ab", [1], "x")),
    ]:
        with pytest.raises(error, match=message):
            model.add_weighted_adapter(*arguments)
    with pytest.raises(ConfigError, match="no option 'density'"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "x", "linear", density=0.5)
    assert set(model.peft_config) == {"a", "b"}
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


STOCK = """
import sys, warnings, torch
from peft import PeftModel
from torch import nn
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)
        self.lin2 = nn.Linear(12, 6)
    def forward(self, x):
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))
folder = sys.argv[1]
data = torch.load(folder + "/data.pt")
base = MLP()
base.load_state_dict(data["base"])
warnings.simplefilter("ignore")
model = PeftModel.from_pretrained(base, folder + "/ab").eval()
torch.testing.assert_close(model(data["x"]), data["y"])
assert "shira" not in sys.modules
"""


def test_stock_peft_loads_it(tmp_path):
    model = two()
    base = {name.removeprefix("base_model.model."): w for name, w in base_weights(model).items()}
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "ab", "ties")
    model.set_adapter("ab")
    model.save_pretrained(tmp_path, selected_adapters=["ab"])
    torch.save({"base": base, "x": X, "y": model(X).detach()}, tmp_path / "data.pt")
    program(STOCK, tmp_path)
