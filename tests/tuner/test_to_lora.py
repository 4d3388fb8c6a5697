# SPDX-License-Identifier: Apache-2.0
"""PEFT's `convert_to_lora` and `save_as_lora` on SHiRA, and the way back."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftMixedModel, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import nn

from shira import Adapter, PeftModel, ShiraConfig
from shira.convert import from_lora
from shira.errors import AdapterError, ConfigError, TargetError, UnknownAdapterError
from tests.forked import program

from .models import EVERYTHING, MLP, everything, gpt2, llama, mlp, randomize

IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
EVERY = [name for name in EVERYTHING if name not in ("along", "back")]  # circular, transposed


def adapted(base, targets, **options):
    options = {"density": 0.3, "random_seed": 0, "target_modules": targets, **options}
    model = get_peft_model(base, ShiraConfig(**options)).eval()
    randomize(model)
    return model


def dense(layer, name="default"):
    """A layer's delta, by PEFT's definition of it."""
    return layer.get_delta_weight(name).to_dense().detach()


def dense_of(delta):
    whole = torch.zeros(delta.support.shape).flatten()
    return whole.index_copy(0, delta.support.indices.long(), delta.values)


def update(state, path):
    """B A of a state dict."""
    a, b = (state[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    return b.flatten(1) @ a.flatten(1)


def test_at_full_rank_it_is_the_adapter(tmp_path, recwarn):
    model = adapted(everything(), EVERY)
    wanted = model(IDS)
    save_as_lora(tmp_path, model, rank=1.0)
    assert not [w for w in recwarn if "squared deltas" in str(w.message)]
    loaded = PeftModel.from_pretrained(everything(), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(loaded(IDS), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(loaded(IDS), everything()(IDS), atol=1e-2)
    assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_language_model(build, tmp_path):
    targets = ["c_attn", "c_proj"] if build is gpt2 else ["q_proj", "down_proj", "embed_tokens"]
    model = adapted(build(), targets, task_type="CAUSAL_LM")
    save_as_lora(tmp_path, model, rank=16)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_rank_is_the_nearest_and_its_energy_is_said():
    model = adapted(mlp(), ["lin1", "lin2"])
    layers = model.base_model.model
    with pytest.warns(UserWarning, match="rank 2 keeps") as told:
        config, state = peft.convert_to_lora(model, rank=2)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 2, {})
    assert config.target_modules == {"lin1", "lin2"}
    shares, whole, kept = {}, 0.0, 0.0
    for path in ("lin1", "lin2"):
        wanted = dense(getattr(layers, path))
        u, s, vh = torch.linalg.svd(wanted)
        best = u[:, :2] * s[:2] @ vh[:2]
        torch.testing.assert_close(update(state, path), best, rtol=1e-4, atol=1e-5)
        whole, kept = whole + float(s.square().sum()), kept + float(s[:2].square().sum())
        shares[path] = float(s[:2].square().sum() / s.square().sum())
    least = min(shares, key=shares.get)
    (said,) = (str(w.message) for w in told if "squared deltas" in str(w.message))
    assert f"keeps {kept / whole:.1%} of" in said
    assert f"least, {shares[least]:.1%}, in '{least}'" in said


def test_a_share_takes_the_smallest_rank_that_keeps_it(tmp_path):
    model = adapted(mlp(), ["lin1", "lin2"])
    with pytest.warns(UserWarning, match="squared deltas"):
        save_as_lora(tmp_path, model, rank=0.7)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    config = loaded.peft_config["default"]
    for path in ("lin1", "lin2"):
        s = torch.linalg.svdvals(dense(getattr(model.base_model.model, path)))
        shares = s.square().cumsum(0) / s.square().sum()
        smallest = int((shares < 0.7).sum()) + 1
        assert 1 < smallest < len(s)
        assert config.rank_pattern.get(path, config.r) == smallest
        layer = getattr(loaded.base_model.model, path)
        assert (layer.r["default"], layer.scaling["default"]) == (smallest, 1.0)


def test_blocks_cost_what_they_span(monkeypatch):
    model = adapted(MLP(32), ["lin1"], mask_type="block_diagonal", density=4 / 32)
    wanted = dense(model.base_model.model.lin1)
    _, state = peft.convert_to_lora(model, rank=32)
    torch.testing.assert_close(update(state, "lin1"), wanted, rtol=1e-4, atol=1e-5)
    config = ShiraConfig(r=2, target_modules=["lin1"])
    config.mask_fn = four_rows
    rows = get_peft_model(MLP(32), config)
    randomize(rows)
    sizes, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **k: sizes.append(m.shape) or svd(m, **k))
    _, state = peft.convert_to_lora(rows, rank=5)
    assert sizes == [(4, 32)]
    assert state["base_model.model.lin1.lora_A.weight"].shape == (5, 32)  # filled up with zeros
    torch.testing.assert_close(update(state, "lin1"), dense(rows.base_model.model.lin1))


def four_rows(layer, r, **kwargs):
    mask = torch.zeros_like(layer.weight)
    mask[[3, 5, 9, 20]] = 1
    return mask


def test_factors_that_were_set_count_and_an_untrained_one_is_zeros():
    model = adapted(mlp(), ["lin1"])
    model.base_model.model.lin1.set_scale("default", -0.5)
    _, state = peft.convert_to_lora(model, rank=12)
    torch.testing.assert_close(
        update(state, "lin1"), dense(model.base_model.model.lin1), rtol=1e-4, atol=1e-5
    )
    model.add_adapter("new", ShiraConfig(r=1, target_modules=["lin2"], random_seed=1))
    config, state = peft.convert_to_lora(model, rank=0.9, adapter_name="new")
    assert (config.r, config.target_modules) == (1, {"lin2"})
    assert not update(state, "lin2").any()


class Headed(nn.Module):
    """A head of several layers, of which one's name ends that of another."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"lin": nn.Linear(8, 8)})
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        return self.head(torch.tanh(self.block["lin"](torch.tanh(self.lin(x)))))


def headed():
    torch.manual_seed(0)
    return Headed()


def test_whole_modules_go_along(tmp_path):
    options = {"modules_to_save": ["head"], "layers_to_transform": None}
    model = adapted(headed(), ["lin"], **options)
    model.add_adapter("other", ShiraConfig(r=1, target_modules=["lin"], random_seed=1, **options))
    heads = model.base_model.model.head.modules_to_save
    with torch.no_grad():
        for number, parameter in enumerate(heads["default"].state_dict().values()):
            parameter.fill_(number + 1)
    save_as_lora(tmp_path, model, rank=0.999999)
    loaded = PeftModel.from_pretrained(headed(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "shira" in key]


def test_only_the_layers_that_have_it_are_targets(tmp_path):
    model = adapted(headed(), ["block.lin"])  # a name that "lin" would match too
    model.add_adapter("other", ShiraConfig(r=1, target_modules="lin", random_seed=1))
    config, _ = peft.convert_to_lora(model, rank=2, adapter_name="other")
    assert config.target_modules == "lin"
    config, _ = peft.convert_to_lora(model, rank=2)
    assert config.target_modules == {"block.lin"}


def test_different_ranks_of_modules_whose_names_end_alike(tmp_path):
    model = adapted(headed(), ["lin"], rank_pattern={"block.lin": 1}, r=3, density=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_as_lora(tmp_path, model, rank=0.8)
    loaded = PeftModel.from_pretrained(headed(), tmp_path).base_model.model
    assert loaded.lin.r != loaded.block["lin"].r
    assert loaded.lin.scaling == loaded.block["lin"].scaling == {"default": 1.0}


def test_without_a_peft_model(tmp_path):
    model = llama()
    model.add_adapter(ShiraConfig(r=2, target_modules=["q_proj"], random_seed=0))
    randomize(model)
    wanted = model(IDS).logits
    save_as_lora(tmp_path, model, rank=16)
    other = llama()
    other.load_adapter(tmp_path)
    torch.testing.assert_close(other(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_and_back(tmp_path):
    model = adapted(gpt2(), ["c_attn", "c_proj"])
    save_as_lora(tmp_path / "lora", model, rank=16)
    back = from_lora(tmp_path / "lora", base=gpt2(), density=0.3)
    assert back.energy_share > 1 - 1e-5
    ours = Adapter.from_model(model)
    assert back.adapter.keys() == ours.keys()
    for name, delta in ours.items():
        theirs = back.adapter[name]
        torch.testing.assert_close(dense_of(theirs), dense_of(delta), rtol=1e-4, atol=1e-5)
    back.adapter.save(tmp_path / "shira", format="peft")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "shira", is_trainable=True).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    loaded(IDS).logits.square().sum().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_a_compiled_conversion():
    model = adapted(mlp(), ["lin1"])
    _, state = peft.convert_to_lora(model, rank=12, compile_kwargs={"backend": "eager"})
    _, wanted = peft.convert_to_lora(model, rank=12)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, "3", True, None])
def test_ranks_that_cannot_be(rank):
    with pytest.raises(ConfigError, match="rank is"):
        peft.convert_to_lora(adapted(mlp(), ["lin1"]), rank=rank)


def test_what_is_refused(tmp_path):
    model = adapted(mlp(), ["lin1", "lin2"])
    with pytest.raises(ConfigError, match=r"lin2.weight: a LoRA of rank 7 .* 6 x 12"):
        save_as_lora(tmp_path / "new", model, rank=7)
    with pytest.raises(UnknownAdapterError, match="no SHiRA adapter 'defualt'"):
        peft.convert_to_lora(model, rank=1, adapter_name="defualt")
    with torch.no_grad():
        model.base_model.model.lin2.shira_weight["default"][0] = torch.nan
    with pytest.raises(AdapterError, match=r"lin2.weight: adapter 'default' has values not finite"):
        peft.convert_to_lora(model, rank=1)
    mixed = PeftMixedModel(
        mlp(), ShiraConfig(r=1, target_modules=["lin1"], random_seed=0), "default"
    )
    mixed.add_adapter("lora", LoraConfig(r=1, target_modules=["lin2"]))
    with pytest.raises(AdapterError, match="'lin2': adapted by another method"):
        peft.convert_to_lora(mixed, rank=1)


GROUPED = [
    (nn.Conv1d(8, 12, 3, groups=4, stride=2), (2, 8, 9)),
    (nn.Conv2d(8, 12, (3, 1), groups=2, padding="same"), (2, 8, 5, 6)),
    (nn.Conv2d(6, 12, 3, groups=6, padding_mode="reflect"), (2, 6, 5, 5)),  # of nothing
    (nn.Conv3d(4, 4, 2, groups=2), (1, 4, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), GROUPED)
@pytest.mark.parametrize("density", [0.3, 0.02])  # groups without entries
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_convolution_in_groups(layer, shape, density, tmp_path):
    model = adapted(nn.Sequential(layer), ["0"], density=density)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = model(x)
    assert not torch.allclose(wanted, layer(x))
    save_as_lora(tmp_path, model, rank=1.0)
    loaded = PeftModel.from_pretrained(nn.Sequential(layer), tmp_path).eval()
    assert loaded.peft_config["default"].r % layer.groups == 0
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_each_group_has_its_part_of_the_rank():
    layer = nn.Conv1d(8, 12, 3, groups=2)
    model = adapted(nn.Sequential(layer), ["0"])
    matrices = dense(model.base_model.model[0]).flatten(1).chunk(2)
    energies = torch.stack([torch.linalg.svdvals(m).square() for m in matrices]).sum(0)
    for rank in (4, 0.7):
        with pytest.warns(UserWarning, match="squared deltas") as told:
            config, state = peft.convert_to_lora(model, rank=rank)
        each = config.r // 2
        share = float(energies[:each].sum() / energies.sum())
        assert any(f"keeps {share:.1%} of" in str(w.message) for w in told)
        if rank == 0.7:
            assert share >= 0.7 > float(energies[: each - 1].sum() / energies.sum())
        a, b = (state[f"base_model.model.0.lora_{side}.weight"] for side in "AB")
        assert (a.shape, b.shape) == ((2 * each, 8, 3), (12, each, 1))
        for group, wanted in enumerate(matrices):
            ours = a[group * each :][:each]
            assert not ours[:, 4 * (1 - group) :][:, :4].any()  # the other's input
            u, s, vh = torch.linalg.svd(wanted, full_matrices=False)
            best = u[:, :each] * s[:each] @ vh[:each]
            found = b[6 * group :][:6, :, 0] @ ours[:, 4 * group :][:, :4].flatten(1)
            torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"0.weight: .* in 2 groups .* multiple of 2, not 3"):
        peft.convert_to_lora(model, rank=3)
    with pytest.raises(ConfigError, match=r"2 groups of 6 x 12 have room for; .* up to 12"):
        peft.convert_to_lora(model, rank=14)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.ConvTranspose1d(4, 4, 3), "has no transposed convolutions"),
        (nn.Conv2d(4, 4, 3, dilation=(1, 2)), r"leaves out the dilation, which is \(1, 2\)"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ],
)
def test_a_convolution_that_pefts_lora_cannot_hold(layer, why):
    model = adapted(nn.Sequential(layer), ["0"])
    with pytest.raises(
        TargetError, match=f"0: PEFT's LoRA cannot hold .* {type(layer).__name__}: "
    ):
        peft.convert_to_lora(model, rank=1)
    with pytest.raises(TargetError, match=why):
        peft.convert_to_lora(model, rank=1)


IMPORTED_BEFORE = """
from peft import convert_to_lora, get_peft_model
from torch import nn
from shira import ShiraConfig
from shira.errors import AdapterError

model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), ShiraConfig(r=1, target_modules=["0"]))
try:
    convert_to_lora(model, rank=2)
except AdapterError as error:
    print(error)
"""


def test_the_function_of_before_is_refused():
    assert "before shira was imported" in program(IMPORTED_BEFORE)


def test_other_methods_are_pefts():
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["lin1"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="already a LoRA"):
        peft.convert_to_lora(model, rank=2)
    other = IA3Config(target_modules=["lin1"], feedforward_modules=[])
    with pytest.raises(TypeError, match="not support"):
        peft.convert_to_lora(get_peft_model(mlp(), other), rank=2)
