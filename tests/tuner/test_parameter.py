# SPDX-License-Identifier: Apache-2.0
"""``target_parameters``: experts of a mixture, and any parameter of a module by its name."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import shira.tuner.adapted_weight as reading
from shira import Adapter, PeftModel, ShiraConfig, Support, Switch, calibrate, get_peft_model
from shira.errors import AdapterError, ConfigError, FileFormatError, MaskError, TargetError
from shira.masks import magnitude_support
from shira.tuner.parameter import ParameterLayer
from tests.forked import program
from tests.tuner.experts import EXPERTS, MODELS, mixture, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def config_of(targets=EXPERTS, modules=(), **options):
    given = {"r": 2, "random_seed": 0, "target_modules": [*modules]} | options
    return ShiraConfig(target_parameters=targets, **given)


def adapted(name="Qwen3Moe", implementation="eager", **options):
    """A mixture with an adapter in its experts that does something."""
    model = get_peft_model(mixture(name, implementation=implementation), config_of(**options))
    perturb(model)
    return model.eval()


def perturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "shira_weight" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParameterLayer)]


CASES = [(n, way) for n in MODELS for way in ("eager", "grouped_mm", "batched_mm")]
CASES = [case for case in CASES if case[0] != "Llama4" or case[1] == "eager"]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_mixture_trains_and_computes_as_merged(name, way, monkeypatch):
    """In each layout of experts, and each of transformers' ways to compute them."""
    if way != "batched_mm":  # which takes a matrix for each token, the copy of the weight first
        monkeypatch.setattr(reading, "_made", lambda *args: pytest.fail("a copy of the weight"))
    base = mixture(name, implementation=way)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, config_of())
    ids, losses = tokens(), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts without tokens
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
    assert torch.equal(apart, merged)
    after = model.unload().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_gradients_are_those_of_the_merged_weight(name, way, dtype):
    if way == "grouped_mm" and dtype == torch.float64:
        pytest.skip("torch has no such grouped_mm")
    model = adapted(name, way).to(dtype)
    ids = tokens()
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    dense = {key: value.grad for key, value in merged.named_parameters()}
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(wrappers(model)) == (2 if name == "DeepseekV3" else 4)
    for wrapper in wrappers(model):
        gradient, support = dense[wrapper.weight_name], wrapper.support("default")
        expected = gradient.reshape(-1)[support.indices.long()].float()
        found = wrapper.shira_weight["default"].grad.float()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_the_gradient_below_the_experts(way):
    model = adapted("Qwen3Moe", way)
    merged = copy.deepcopy(model).merge_and_unload()
    ids, gradients = tokens(), []
    for one in (model, merged):
        x = one.get_input_embeddings()(ids).detach().requires_grad_()
        one(inputs_embeds=x, labels=ids).loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_transformers_own_grouped_product(monkeypatch):
    from transformers.integrations import moe

    if not hasattr(moe, "_can_use_grouped_mm"):
        pytest.skip("transformers of this release has no grouped product of its own")
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    monkeypatch.setattr(reading, "_made", lambda *args: pytest.fail("a copy of the weight"))
    test_gradients_are_those_of_the_merged_weight("Mixtral", "grouped_mm", torch.float32)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_two_adapters_at_once(way):
    model = adapted("GptOss", way)
    model.add_adapter("other", config_of(random_seed=7))
    perturb(model, 2)
    assert len(wrappers(model)) == 4  # no wrappers around those that are there
    model.base_model.set_adapter(["default", "other"])
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, merged(input_ids=ids).logits)
    merged.requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    dense = {key: value.grad for key, value in merged.named_parameters()}
    for wrapper in wrappers(model):
        for name in ("default", "other"):
            expected = dense[wrapper.weight_name].reshape(-1)[wrapper.support(name).indices.long()]
            found = wrapper.shira_weight[name].grad
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


def test_an_expert_without_tokens_gets_no_gradient():
    model = adapted("Mixtral", targets=["0.mlp.experts.gate_up_proj"])
    ids = tokens(shape=(1, 1))  # two experts of six
    model(input_ids=ids.repeat(1, 2), labels=ids.repeat(1, 2)).loss.backward()
    (wrapper,) = wrappers(model)
    per_expert = wrapper.shira_weight["default"].grad.view(6, -1).abs().sum(1)
    assert 1 <= int((per_expert > 0).sum()) <= 4


def test_the_gradient_costs_the_entries_and_no_dense_one(monkeypatch):
    """Eager experts take `linear` on a matrix, and autograd sees nothing of the stack's size."""
    model = adapted("Qwen3Moe", "eager", targets=["0.mlp.experts.down_proj"])
    sizes = []
    original = torch.Tensor.clone

    def noted(self, *args, **kwargs):
        sizes.append(self.numel())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", noted)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    (wrapper,) = wrappers(model)
    assert all(size < wrapper.support("default").numel for size in sizes)


# ------------------------------------------------------------------------------------------- masks


def test_each_expert_has_the_budget_of_a_matrix():
    model = adapted(r=3)
    for wrapper in wrappers(model):
        experts, rows, cols = wrapper.weight_shape
        indices = wrapper.support("default").indices.long()
        counts = torch.bincount(indices // (rows * cols), minlength=experts)
        assert counts.tolist() == [3 * (rows + cols)] * experts
        entries = indices % (rows * cols)
        first, second = (entries[indices // (rows * cols) == at] for at in (0, 1))
        assert not torch.equal(first, second)  # each has a mask of its own


def test_density_and_rank_pattern_count_for_each_expert():
    model = adapted(rank_pattern={"experts.down_proj": 1}, r=2)
    ranks = {wrapper.parameter_name: wrapper.r["default"] for wrapper in wrappers(model)}
    assert ranks == {"gate_up_proj": 2, "down_proj": 1}
    model = adapted(density=0.01)
    for wrapper in wrappers(model):
        experts, rows, cols = wrapper.weight_shape
        assert wrapper.support("default").nnz == experts * max(1, round(0.01 * rows * cols))


@pytest.mark.parametrize("mask", ["struct", "magnitude", "block", "block_diagonal"])
def test_masks_are_made_in_each_expert(mask):
    options = {"mask_options": {"block_size": 4}} if "block" in mask else {}
    model = adapted(mask_type=mask, **options)
    ids = tokens()
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        assert torch.equal(apart, copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits)
    wrapper = wrappers(model)[0]
    experts, rows, cols = wrapper.weight_shape
    indices = wrapper.support("default").indices.long()
    assert torch.bincount(indices // (rows * cols)).tolist() == [2 * (rows + cols)] * experts
    if mask == "magnitude":
        weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
        expected = magnitude_support(weight[3], 2 * (rows + cols)).indices.long()
        inside = indices[indices // (rows * cols) == 3] - 3 * rows * cols
        assert torch.equal(inside, expected)


@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_calibration_chooses_in_each_expert(mask):
    base = mixture()
    config = config_of(mask_type=mask)
    config = calibrate(base, config, [{"input_ids": tokens(), "labels": tokens()}], progress=False)
    model = get_peft_model(base, config)
    for wrapper in wrappers(model):
        experts, rows, cols = wrapper.weight_shape
        indices = wrapper.support("default").indices.long()
        assert torch.bincount(indices // (rows * cols)).tolist() == [2 * (rows + cols)] * experts


def test_a_mask_of_ones_own_sees_the_parameter_as_a_weight():
    seen = []

    def mask_fn(layer, r, name, **_):
        seen.append((name, tuple(layer.weight.shape)))
        mask = torch.zeros(layer.weight.shape)
        mask[:, :, : r + 1] = 1
        return mask

    config = ShiraConfig(target_modules=[], target_parameters=["0.mlp.experts.down_proj"], r=1,
                         mask_type="mine", inference_mode=True)  # fmt: skip
    config.inference_mode, config.mask_fn = False, mask_fn
    with pytest.raises(MaskError, match=r"mask_fn for .*down_proj"):
        get_peft_model(mixture(), config)
    assert seen == [("model.layers.0.mlp.experts.down_proj", (6, 32, 24))]


def test_a_budget_that_does_not_fit_an_expert():
    with pytest.raises(MaskError, match="largest r that fits is 13"):
        get_peft_model(mixture(), config_of(r=14, targets=["experts.down_proj"]))


# ------------------------------------------------------------------------------------------- files


def test_a_file_names_the_parameters(tmp_path):
    from safetensors import safe_open

    model = adapted(modules=["q_proj"])
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = {key for key in file.keys() if "layers.0" in key}  # noqa: SIM118
    start = "base_model.model.model.layers.0"
    assert keys == {
        f"{start}.{module}.{kind}"
        for module in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj")
        for kind in ("shira_weight", "shira_indices")
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(EXPERTS)
    assert config["shira_shapes"]["model.layers.0.mlp.experts.down_proj"] == [6, 32, 24]


def test_saved_and_loaded_in_another_process(tmp_path):
    model, ids = adapted("Qwen3Moe", "grouped_mm", modules=["q_proj"]), tokens()
    base = mixture(implementation="grouped_mm")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.save((ids, model(input_ids=ids).logits), tmp_path / "expected.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
from shira import PeftModel
torch.set_num_threads(1)  # as here: the order of sums depends on it
ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
base.set_experts_implementation("grouped_mm")
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, expected)
"""
    program(code)


def test_a_second_adapter_and_another_order(tmp_path):
    model, ids = adapted(), tokens()
    model.add_adapter("other", config_of(random_seed=5, targets=["experts.down_proj"]))
    perturb(model, 3)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        with torch.no_grad():
            expected[name] = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(), tmp_path / "other", adapter_name="other").eval()
    result = loaded.load_adapter(tmp_path, adapter_name="default")
    assert not result.unexpected_keys
    for name in ("default", "other"):
        loaded.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, expected[name])
    # the order of the wrappers is that of the module's parameters, whichever came first
    assert list(loaded.state_dict().keys() - model.state_dict().keys()) == []


def test_training_goes_on_after_loading(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mixture(), tmp_path, is_trainable=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(wrapper.shira_weight["default"].grad is not None for wrapper in wrappers(model))


def test_files_of_both_formats_and_a_config_that_lies(tmp_path):
    model, ids = adapted(modules=["q_proj"]), tokens()
    adapter = Adapter.from_model(model)
    adapter.save(tmp_path / "one.safetensors")
    adapter.save(tmp_path / "peft", format="peft")
    assert Adapter.load(tmp_path / "one.safetensors") == adapter
    assert Adapter.load(tmp_path / "peft") == adapter
    loaded = PeftModel.from_pretrained(mixture(), tmp_path / "peft").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(FileFormatError, match="not among the config's"):
        PeftModel.from_pretrained(mixture(), tmp_path / "peft")


def test_another_base_is_told(tmp_path):
    from shira.errors import WrongBaseError

    adapted().save_pretrained(tmp_path)
    with pytest.raises(WrongBaseError, match="wrong base"):
        PeftModel.from_pretrained(mixture(seed=1), tmp_path)


def test_adapters_are_fused_in_the_model():
    model = adapted()
    model.add_adapter("other", config_of(random_seed=5))
    perturb(model, 3)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", "linear")
    a, b = (Adapter.from_model(model, name) for name in ("default", "other"))
    both = Adapter.from_model(model, "both")
    expected = 0.5 * a + 2.0 * b
    for name in expected:
        at = both[name].support.positions_of(expected[name].support)
        assert torch.equal(both[name].values[at], expected[name].values)
        assert both[name].nnz == expected[name].nnz  # no zeros beside them


# --------------------------------------------------------------------------------------- switching


def test_switched_a_hundred_times():
    model = mixture()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    switch = Switch(model)
    switch.load("one", Adapter.from_model(adapted()))
    switch.load("two", Adapter.from_model(adapted(random_seed=9)))
    with torch.no_grad():
        expected = adapted()(input_ids=tokens()).logits
        for turn in range(100):
            switch.activate(["one", "two"][turn % 2])
            if turn % 50 == 0:
                assert torch.equal(model(input_ids=tokens()).logits, expected)
    switch.deactivate()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


# ------------------------------------------------------------------------- other uses of the model


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = adapted("Qwen3Moe", "grouped_mm").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([wrapper.shira_weight["default"].grad for wrapper in wrappers(model)])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_autocast(way):
    model, ids = adapted("Qwen3Moe", way), tokens()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16):
        apart, together = model(input_ids=ids).logits, merged(input_ids=ids).logits
        model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(apart, together)
    assert all(wrapper.shira_weight["default"].grad is not None for wrapper in wrappers(model))


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_a_base_in_bfloat16(way):
    model = get_peft_model(mixture(implementation=way).bfloat16(), config_of())
    perturb(model)
    assert wrappers(model)[0].shira_weight["default"].dtype == torch.float32
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, merged(input_ids=tokens()).logits)


def test_adapters_disabled_deleted_and_copied():
    model, ids = adapted(), tokens()
    with torch.no_grad():
        base = mixture()(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base)
        apart = model(input_ids=ids).logits
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base)
        model.unmerge_adapter() if wrappers(model)[0].merged else None
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, apart)
        model.delete_adapter("default")
        assert torch.equal(model(input_ids=ids).logits, base)


def test_names_for_samples_are_one_for_all_or_refused():
    model, ids = adapted(), tokens()
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, adapter_names=["default"] * 2).logits, apart)
        base = mixture()(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, adapter_names=["__base__"] * 2).logits, base)
        with pytest.raises(AdapterError, match="must be all the same"):
            model(input_ids=ids, adapter_names=["default", "__base__"])


# ------------------------------------------------------------------------------ parameters by name


class Scaled(nn.Module):
    """A module with parameters of one, two and three dimensions, all used in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.kinds = nn.Parameter(torch.randn(2, 6, 6))
        self.one = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        y = (x @ self.mix + x @ self.mix.T) * self.scale
        return torch.einsum("bi,kij->bj", y, self.kinds) * self.one + y @ self.kinds[-1].t()


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.head = Scaled(), nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.part(x)) + x @ self.part.mix.mT


@pytest.mark.parametrize("targets", [["mix"], ["scale"], ["kinds"], ["mix", "scale", "kinds"],
                                     ["part.mix", "head.weight"]])  # fmt: skip
def test_any_parameter_by_its_name(targets):
    config = config_of(targets, density=0.5)
    model = get_peft_model(Holder(), config)
    for value in model.parameters():
        if value.requires_grad:
            nn.init.normal_(value)
    x = torch.randn(5, 6)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.part) is Scaled
    torch.testing.assert_close(model(x), merged(x), rtol=0, atol=0)
    merged.requires_grad_(True)
    merged(x).square().sum().backward()
    model(x).square().sum().backward()
    dense = {key: value.grad for key, value in merged.named_parameters()}
    assert len(wrappers(model)) == len(targets)
    for wrapper in wrappers(model):
        expected = dense[wrapper.weight_name].reshape(-1)[wrapper.support("default").indices.long()]
        torch.testing.assert_close(wrapper.shira_weight["default"].grad, expected)


def test_read_from_outside_a_parameter_is_adapted():
    model = get_peft_model(Holder(), config_of(["part.mix"], density=0.5))
    nn.init.normal_(wrappers(model)[0].shira_weight["default"])
    merged = copy.deepcopy(model).merge_and_unload()
    part = model.base_model.model.part
    assert torch.equal(part.mix + 0, merged.part.mix)
    assert torch.equal(part.scale, merged.part.scale)
    with pytest.raises(AttributeError):
        part.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("targets", "modules", "message"),
    [
        (["part.one"], [], "a single number"),
        (["head.weight"], ["head"], "target_parameters, and its module by target_modules"),
        (["head.bias"], ["head"], "target_parameters, and its module by target_modules"),
        (["nothing"], [], "not found"),
    ],
)
def test_refused_before_anything_is_touched(targets, modules, message):
    model = Holder()
    before = [name for name, _ in model.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TargetError, match=message):
            get_peft_model(model, config_of(targets, modules, density=0.5))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize("config", [ShiraConfig, LoraConfig])
def test_modules_are_excluded_and_parameters_that_are_named_are_not(config):
    """In PEFT's LoRA neither."""
    named = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    model = get_peft_model(mixture(), config(r=2, **named, exclude_modules=["experts", "q_proj"]))
    adapted = {path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    layers = [f"base_model.model.model.layers.{number}." for number in range(2)]
    assert adapted == {f"{layer}mlp.experts" for layer in layers}


def test_a_parameter_of_the_model_itself_is_refused():
    with pytest.raises(ValueError, match=r"top-level module is not supported \(parameter 'mix'\)"):
        get_peft_model(Scaled(), config_of(["mix"], density=0.5))


def test_names_are_a_list():
    with pytest.raises(ConfigError, match="`target_parameters` must be a list of strings or None"):
        ShiraConfig(target_parameters="experts.down_proj")


def test_one_that_matches_nothing_is_told():
    near = "matches no parameter.* Did you mean 'experts.down_proj'"
    with pytest.warns(UserWarning, match=f"'experts.dwon_proj' {near}"):
        get_peft_model(mixture(), config_of(["experts.dwon_proj", "experts.down_proj"]))
    with pytest.raises(TargetError, match=r"Did you mean 'experts\.gate_up_proj'"):
        get_peft_model(mixture(), config_of(["experts.gate_up"]))


def test_the_support_of_a_stack_is_a_support():
    delta = Adapter.from_model(adapted())["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(delta.support, Support)
    assert delta.support.shape == (6, 32, 24)


# ------------------------------------------------------------------------------- from end to end


def test_from_training_to_a_merged_checkpoint(tmp_path):
    """Trained, saved, loaded in another process, switched, merged on disk: one adapter, one bit."""
    from transformers import AutoModelForCausalLM

    from shira.convert import merge, unmerge

    mixture(implementation="grouped_mm").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model, ids, losses = get_peft_model(base, config_of(modules=["q_proj"])), tokens(), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    Adapter.load(tmp_path / "adapter").save(tmp_path / "compact.safetensors")
    in_memory = model.merge_and_unload().state_dict()

    for source in ("adapter", "compact.safetensors"):
        out, undo, back = (tmp_path / f"{what} {source[:3]}" for what in ("out", "undo", "back"))
        merge(tmp_path / source, tmp_path / "base", out, undo=undo)
        merged = AutoModelForCausalLM.from_pretrained(out).eval()
        assert merged.state_dict().keys() == in_memory.keys()
        assert all(torch.equal(merged.state_dict()[k], value) for k, value in in_memory.items())
        with torch.no_grad():
            assert torch.equal(merged(input_ids=ids).logits, expected)
        unmerge(out, undo, back)
        for file in (tmp_path / "base").glob("*.safetensors"):
            assert file.read_bytes() == (back / file.name).read_bytes()


def test_lora_in_the_same_parameters_is_refused():
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    below = get_peft_model(mixture(), lora)
    with pytest.raises(TargetError, match="its module is adapted by ParamWrapper"):
        get_peft_model(below.base_model.model, config_of())
    ours = adapted()
    with torch.no_grad():
        before = ours(input_ids=tokens()).logits
        with pytest.raises(ValueError, match="not a valid target"):
            get_peft_model(ours.base_model.model, lora)
        assert torch.equal(ours(input_ids=tokens()).logits, before)


def test_exchanged_in_place(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model, other = adapted(), adapted(random_seed=3)
    perturb(other, 9)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, other(input_ids=tokens()).logits)


def test_transformers_own_loading_says_what_it_lacks(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = mixture()
    with pytest.raises(FileFormatError, match=r"was loaded.*PeftModel\.from_pretrained"):
        model.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, mixture()(input_ids=tokens()).logits)


def test_compiled():
    model = get_peft_model(Holder(), config_of(["mix", "kinds"], density=0.5))
    perturb(model)
    x = torch.randn(5, 6)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    found = [wrapper.shira_weight["default"].grad.clone() for wrapper in wrappers(model)]
    model.zero_grad()
    model(x).sum().backward()
    for wrapper, gradient in zip(wrappers(model), found, strict=True):
        torch.testing.assert_close(wrapper.shira_weight["default"].grad, gradient)
