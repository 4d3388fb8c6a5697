# SPDX-License-Identifier: Apache-2.0
"""PEFT's life cycle on our layers: several adapters, scales, mixed batches, hooks, copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shira import ShiraConfig, get_peft_model
from shira.errors import AdapterError, MaskError, MergeError, TargetError, UnknownAdapterError

from .models import MLP, base_weights, everything, llama, mlp, randomize, same_weights

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def two_adapters(model=None):
    model = get_peft_model(
        mlp() if model is None else model,
        ShiraConfig(r=2, target_modules=["lin1", "lin2"], random_seed=1),
        adapter_name="first",
    )
    model.add_adapter("second", ShiraConfig(r=1, target_modules=["lin1"], random_seed=2))
    randomize(model)
    return model.eval()


def dense(model, names, scales=None):
    """The base's output with the adapters' deltas added densely."""
    net = copy.deepcopy(model.base_model.model)
    out = X
    for name in ("lin0", "lin1", "lin2"):
        layer = getattr(net, name)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        weight = base.weight
        for adapter in names:
            if adapter in getattr(layer, "shira_weight", {}):
                weight = weight + layer.get_delta_weight(adapter).to_dense()
        out = F.linear(out if name == "lin0" else torch.relu(out), weight, base.bias)
    return out


def test_switching_and_several_active_adapters():
    model = two_adapters()
    outputs = {}
    for names in (["first"], ["second"], ["first", "second"]):
        model.base_model.set_adapter(names)
        outputs[tuple(names)] = model(X)
        torch.testing.assert_close(model(X), dense(model, names))
    assert len({tuple(out.flatten().tolist()) for out in outputs.values()}) == 3


def test_gradients_of_several_active_adapters():
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    model(X).square().sum().backward()
    layer = model.base_model.model.lin1
    got = {name: layer.shira_weight[name].grad.clone() for name in ("first", "second")}
    for parameter in model.parameters():
        parameter.grad = None
    values = {name: layer.shira_weight[name] for name in got}
    want = torch.autograd.grad(dense_of(model, layer).square().sum(), list(values.values()))
    for gradient, expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(gradient, expected)


def dense_of(model, layer):
    """As `dense`, differentiable in the values of lin1."""
    net = model.base_model.model
    h = torch.relu(net.lin0(X))
    weight = layer.get_base_layer().weight
    for name in ("first", "second"):
        weight = weight + layer.get_delta_weight(name).to_dense()
    return net.lin2(torch.relu(F.linear(h, weight)))


def test_scale():
    model = two_adapters()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("first", -0.25)
            module.set_scale("nobody", 3.0)
    torch.testing.assert_close(model(X), dense(model, ["first"]))


def test_disable_and_delete():
    model, base = two_adapters(), mlp()
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    model.delete_adapter("first")
    assert model.active_adapters == ["second"]
    torch.testing.assert_close(model(X), dense(model, ["second"]))
    assert not any("first" in name for name in model.state_dict())


def test_print_trainable_parameters(capsys):
    two_adapters().print_trainable_parameters()
    k = 2 * (12 + 12) + 2 * (12 + 6)
    assert f"trainable params: {k} " in capsys.readouterr().out


@pytest.mark.parametrize("batch", [["first", "second", "__base__", "first", "__base__"]])
def test_adapter_names_for_each_sample(batch):
    model = two_adapters()
    mixed = model(X, adapter_names=batch)
    with model.disable_adapter():
        want = {"__base__": model(X)}
    for name in ("first", "second"):
        model.set_adapter(name)
        want[name] = model(X)
    for sample, name in enumerate(batch):
        torch.testing.assert_close(mixed[sample], want[name][sample])


def test_adapter_names_errors():
    model = two_adapters()
    with pytest.raises(UnknownAdapterError, match="Did you mean 'second'"):
        model(X, adapter_names=["secnd"] * 5)
    with pytest.raises(AdapterError, match="5"):
        model(X, adapter_names=["first"] * 4)
    model.train()
    with pytest.raises(AdapterError, match="training"):
        model(X, adapter_names=["first"] * 5)
    model.eval().merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        model(X, adapter_names=["first"] * 5)
    model.unmerge_adapter()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adapter_names_in_generation():
    config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], random_seed=0)
    model = get_peft_model(llama(), config).eval()
    randomize(model, scale=2.0)
    ids = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    for beams in (1, 2):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        alone = model.generate(input_ids=ids, **options)
        with model.disable_adapter():
            base = model.generate(input_ids=ids, **options)
        mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **options)
        assert torch.equal(mixed[0][: alone.shape[1]], alone[0])
        assert torch.equal(mixed[1][: base.shape[1]], base[1])


def test_hooks_of_the_base_layer_run_with_the_base_layer():
    model = mlp()
    seen = []
    model.lin1.register_forward_hook(lambda m, i, o: seen.append((m, o)))
    model.lin1.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    model.lin1.register_full_backward_hook(lambda m, gi, go: seen.append((m, go)))
    base = model.lin1
    adapted = get_peft_model(model, ShiraConfig(r=1, target_modules=["lin1"]))
    randomize(adapted)
    with pytest.warns(UserWarning, match="They run"):
        out = adapted(X)
    hidden = torch.relu(adapted.base_model.model.lin0(X)) * 2
    weight = base.weight + adapted.base_model.model.lin1.get_delta_weight("default").to_dense()
    torch.testing.assert_close(seen[0][1], F.linear(hidden, weight))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(X)
    out.sum().backward()
    assert all(module is base for module, _ in seen)
    assert "forward" not in base.__dict__


def test_copies_and_pickles():
    model = two_adapters()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), model(X))
        with torch.no_grad():
            again.base_model.model.lin1.shira_weight["first"].zero_()
        assert not torch.equal(again(X), model(X))


def test_an_adapter_of_equal_shape_elsewhere_gets_other_positions():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(20, 20), nn.Linear(20, 20)

    twins = get_peft_model(
        Twins(), ShiraConfig(r=2, target_modules=["one", "two"])
    ).base_model.model
    one, two = twins.one.support("default"), twins.two.support("default")
    assert one != two
    assert one.overlap(two) < one.nnz // 2


def test_slots_never_overlap():
    model = get_peft_model(
        mlp(), ShiraConfig(r=1, target_modules=["lin1"], random_seed=5, mask_slot=0), "s0"
    )
    for slot in range(1, 6):
        config = ShiraConfig(r=1, target_modules=["lin1"], random_seed=5, mask_slot=slot)
        model.add_adapter(f"s{slot}", config)
    layer = model.base_model.model.lin1
    indices = torch.cat([layer.support(f"s{slot}").indices for slot in range(6)])
    assert indices.unique().numel() == indices.numel() == 6 * 24


def test_budgets():
    config = ShiraConfig(r=1, target_modules=["lin1", "lin2"], rank_pattern={"lin2": 3})
    net = get_peft_model(mlp(), config).base_model.model
    assert net.lin1.shira_weight["default"].numel() == 24
    assert net.lin2.shira_weight["default"].numel() == 3 * 18
    config = ShiraConfig(density=0.25, target_modules=["conv", "emb", "conv1d"])
    net = get_peft_model(everything(), config).base_model.model
    for layer in (net.conv, net.emb, net.conv1d):
        weight = layer.get_base_layer().weight
        assert layer.shira_weight["default"].numel() == round(0.25 * weight.numel())
    model = mlp()
    with pytest.raises(MaskError, match=r"lin2\.weight.*largest r that fits is 4"):
        get_peft_model(model, ShiraConfig(r=5, target_modules=["lin1", "lin2"]))
    assert type(model.lin1) is nn.Linear, "nothing is put in unless all of it fits"


def test_targets_that_match_nothing():
    model = mlp()
    before = base_weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error says it all
        with pytest.raises(TargetError, match="Did you mean 'lin"):
            get_peft_model(model, ShiraConfig(r=1, target_modules=["linn1"]))
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(model, ShiraConfig(r=1, target_modules=r".*\.qproj"))
    assert type(model.lin1) is nn.Linear
    assert same_weights(base_weights(model), before)
    with pytest.warns(UserWarning, match="'lni2' matches no module.*Did you mean 'lin2'"):
        get_peft_model(model, ShiraConfig(r=1, target_modules=["lin1", "lni2"]))


def test_modules_to_save_that_match_nothing_are_named():
    config = {"r": 1, "target_modules": ["lin1"]}
    with pytest.warns(UserWarning, match="modules_to_save: 'lni2' matches no.*Did you mean 'lin2'"):
        get_peft_model(mlp(), ShiraConfig(**config, modules_to_save=["lni2"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT itself adds both names for a head
        get_peft_model(mlp(), ShiraConfig(**config, modules_to_save=["lin2", "score"]))


def test_modules_that_cannot_be_adapted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.emb = nn.Embedding(4, 4, max_norm=1.0)

    with pytest.raises(TargetError, match=r"norm \(LayerNorm\) is not supported"):
        get_peft_model(Odd(), ShiraConfig(r=1, target_modules=["norm"]))
    with pytest.raises(TargetError, match="max_norm"):
        get_peft_model(Odd(), ShiraConfig(r=1, target_modules=["emb"]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_tied_weights():
    with pytest.raises(TargetError, match="'embed' and 'head' share one weight"):
        get_peft_model(Tied(), ShiraConfig(density=0.2, target_modules=["embed", "head"]))
    model = Tied()
    before = model.embed.weight.detach().clone()
    adapted = get_peft_model(model, ShiraConfig(density=0.2, target_modules=["head"]))
    randomize(adapted)
    ids = torch.randint(7, (3,))
    delta = adapted.base_model.model.head.get_delta_weight("default").to_dense()
    torch.testing.assert_close(adapted(ids), before[ids] @ (before + delta).t())
    adapted(ids).sum().backward()
    assert torch.equal(adapted.base_model.model.embed.weight, before)
    with pytest.raises(MergeError, match="'head' shares its weight with 'embed'"):
        adapted.merge_adapter()
    assert torch.equal(adapted.base_model.model.embed.weight, before)


def test_a_weight_whose_entries_share_memory_is_not_merged_into():
    base = nn.Sequential(nn.Linear(6, 6))
    base[0].weight.data = base[0].weight.data[:1].expand(6, 6)
    before = base[0].weight.clone()
    model = get_peft_model(base, ShiraConfig(r=1, target_modules=["0"], init_weights=False))
    expected = model(torch.ones(2, 6))
    with pytest.raises(MergeError, match=r"0\.weight: adapters \['default'\].*share memory"):
        model.merge_adapter()
    assert torch.equal(base[0].base_layer.weight, before)
    assert torch.equal(model(torch.ones(2, 6)), expected)


def test_a_layer_of_another_tuner_is_refused():
    from peft import LoraConfig

    model = get_peft_model(mlp(), LoraConfig(target_modules=["lin1"]), mixed=True)
    with pytest.raises(TargetError, match="nested"):
        model.add_adapter("sparse", ShiraConfig(r=1, target_modules=["lin1"]))


def test_lora_on_top_of_shira():
    from peft import LoraConfig

    before = base_weights(mlp())
    model = get_peft_model(
        mlp(), ShiraConfig(r=1, target_modules=["lin1"]), adapter_name="sparse", mixed=True
    )
    randomize(model)
    want = model(X)
    model.add_adapter("low", LoraConfig(target_modules=["lin1"], r=2))
    model.set_adapter(["sparse", "low"])
    torch.testing.assert_close(model(X), want)  # LoRA begins with nothing
    model(X).sum().backward()
    inner = model.base_model.model.lin1.base_layer
    assert torch.equal(inner.get_base_layer().weight, before["lin1.weight"])


def test_lora_on_top_of_shira_in_a_layer_that_is_read():
    from peft import LoraConfig

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight, self.fc.bias)

    config = ShiraConfig(r=1, target_modules=["fc"])
    model = get_peft_model(Reader(), config, adapter_name="sparse", mixed=True)
    randomize(model)
    x = torch.randn(2, 8)
    want = model(x)
    model.add_adapter("low", LoraConfig(target_modules=["fc"], r=2))
    model.set_adapter(["sparse", "low"])
    assert torch.equal(model(x), want)
    model(x).sum().backward()
    (value,) = (p for n, p in model.named_parameters() if "shira_weight" in n)
    assert value.grad.any()
    model.merge_adapter()
    assert torch.equal(model(x), want)


def test_methods_on_top_of_shira_that_read_the_base_weight_are_refused():
    from peft import HRAConfig, LoraConfig, inject_adapter_in_model

    model = get_peft_model(
        mlp(), ShiraConfig(r=1, target_modules=["lin1"]), adapter_name="sparse", mixed=True
    )
    randomize(model)
    want, layer = model(X), model.base_model.model.lin1
    with pytest.raises(TargetError, match=r"lin1: DoRA .*\['sparse'\] below it"):
        model.add_adapter("low", LoraConfig(target_modules=["lin1"], r=2, use_dora=True))
    assert list(model.peft_config) == ["sparse"]
    inner = model.base_model.model
    with pytest.raises(TargetError, match=r"lin1: HRALinear .*\['sparse'\] below it"):
        inject_adapter_in_model(HRAConfig(target_modules=["lin1"], r=2), inner, "turned")
    assert inner.lin1 is layer
    assert torch.equal(model(X), want)


@pytest.mark.parametrize("kind", ["shared", "private"])
def test_weights_mapped_from_a_file_are_never_written_through(tmp_path, kind):
    path = tmp_path / "weights.bin"
    weight = torch.randn(12, 12)
    path.write_bytes(weight.numpy().tobytes())
    before = path.read_bytes()
    model = MLP()
    mapped = torch.from_file(str(path), shared=kind == "shared", size=144).view(12, 12)
    model.lin1.weight = nn.Parameter(mapped, requires_grad=False)
    place = model.lin1.weight.data_ptr()
    adapted = get_peft_model(model, ShiraConfig(r=2, target_modules=["lin1"]))
    randomize(adapted)
    adapted(X).sum().backward()
    adapted.merge_adapter()
    moved = adapted.base_model.model.lin1.weight.data_ptr() != place
    assert moved == (kind == "shared")
    assert path.read_bytes() == before


def test_a_reference_adapter_with_the_policys_config_is_a_copy_of_the_policy():
    """What TRL's trainers do with a model that has an adapter already."""
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1", "lin2"])).eval()
    randomize(model)
    want = model(X)
    model.add_adapter("ref", model.peft_config["default"])
    randomize_default = model.base_model.model.lin1.shira_weight["default"]
    with torch.no_grad():
        randomize_default.mul_(3)
    assert not torch.equal(model(X), want)
    model.set_adapter("ref")
    assert torch.equal(model(X), want)


class PackedBackend:
    """A stand-in for a quantized base: a weight that cannot be written, a layer that can be run."""

    supports_merge = False
    layer_type = "linear"

    def get_base_weight(self, layer):
        raise AssertionError("the packed weight is not to be unpacked")


def test_a_packed_base_gets_the_delta_beside_it():
    model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"]))
    randomize(model)
    layer = model.base_model.model.lin1
    base, delta = layer.get_base_layer(), layer.get_delta_weight("default").to_dense()
    x = torch.randn(3, 12, requires_grad=True)
    layer.quantization_backend = PackedBackend()
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, base.weight + delta))
    got = torch.autograd.grad(y.square().sum(), [x, layer.shira_weight["default"]])
    layer.quantization_backend = None
    want = torch.autograd.grad(layer(x).square().sum(), [x, layer.shira_weight["default"]])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    layer.quantization_backend = PackedBackend()
    before = base.weight.clone()
    with pytest.raises(MergeError, match="quantized"):
        layer.merge()
    assert torch.equal(base.weight, before)


def test_layers_that_accelerate_offloads(tmp_path):
    from accelerate import cpu_offload

    want_model = get_peft_model(mlp(), ShiraConfig(r=2, target_modules=["lin1"], random_seed=1))
    randomize(want_model)
    base = mlp()
    model = get_peft_model(base, ShiraConfig(r=2, target_modules=["lin1"], random_seed=1))
    randomize(model)
    layer = model.base_model.model.lin1.get_base_layer()
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.weight.is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(X)
    assert torch.equal(out, want_model(X))
    out.sum().backward()
    want_model(X).sum().backward()
    for ours, theirs in zip(model.parameters(), want_model.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert layer.weight.is_meta


def trainable(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("nested", [False, True])
def test_disabling_gives_requires_grad_back_as_it_was(nested):
    config = ShiraConfig(
        r=1, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], random_seed=1
    )
    model = get_peft_model(llama(), config)
    model.add_adapter("other", ShiraConfig(r=1, target_modules=["q_proj"], random_seed=2))
    for name, parameter in model.named_parameters():
        if "layers.0" in name or "lm_head" in name:
            parameter.requires_grad_(False)
        if "layers.1" in name and name.endswith("q_proj.shira_weight.other"):
            parameter.requires_grad_(True)
    before = trainable(model)
    assert set(before.values()) == {True, False}
    with model.disable_adapter():
        assert not any(trainable(model).values())
        if nested:
            with model.disable_adapter():
                pass
    assert trainable(model) == before
    model.disable_adapter_layers()
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert trainable(model) == before
    with model.disable_adapter():
        model.set_adapter("other")
    assert all(
        required == name.endswith(".other")
        for name, required in trainable(model).items()
        if "shira_weight" in name
    )


def test_transformers_own_disabling_too():
    model = llama()
    model.add_adapter(ShiraConfig(r=1, target_modules=["q_proj"], random_seed=1))
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    before = trainable(model)
    model.disable_adapters()
    model.enable_adapters()
    assert trainable(model) == before


@pytest.mark.parametrize("mode", [True, False])
def test_new_layers_take_the_mode_of_what_they_replace(mode):
    base = llama().train(mode)
    base.model.layers[1].self_attn.q_proj.train(not mode)
    before = {name: module.training for name, module in base.named_modules()}
    config = ShiraConfig(r=1, target_modules=["q_proj"], random_seed=1)
    model = get_peft_model(base, config)
    model.add_adapter("other", config)
    for name, module in model.base_model.model.named_modules():
        bare = name.partition(".base_layer")[0].partition(".shira_")[0]
        assert module.training == before[bare], name
    assert model.base_model.training == mode


@pytest.mark.parametrize("whole", [None, ["lm_head"]])
def test_without_its_last_adapter_a_model_is_the_base_and_can_get_another(tmp_path, whole):
    def config(seed):
        return ShiraConfig(
            r=1,
            target_modules=["q_proj"],
            modules_to_save=whole,
            random_seed=seed,
            task_type="CAUSAL_LM",
        )

    ids = torch.arange(6)[None]
    want = llama()(ids).logits
    model = get_peft_model(llama(), config(1)).eval()
    randomize(model)
    for name in ("default", "again"):
        model.delete_adapter(name)
        assert not model.peft_config
        assert torch.equal(model(ids).logits, want)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, want)
        assert not any(trainable(model).values())
        with pytest.raises(KeyError):
            model.peft_config["default"]
        model.add_adapter("again", config(2))
        assert torch.equal(model(ids).logits, want)
        model.set_adapter("again")
        randomize(model)
    other = get_peft_model(llama(), config(2)).eval()
    randomize(other)
    assert torch.equal(model(ids).logits, other(ids).logits)
    model.generate(input_ids=ids, max_new_tokens=1)
    model.save_pretrained(tmp_path)
    model.delete_adapter("again")
    assert torch.equal(copy.deepcopy(model)(ids).logits, want)
    assert same_weights(base_weights(model.unload()), base_weights(llama()))


def test_pefts_switch_for_casting_the_input():
    from peft.helpers import disable_input_dtype_casting

    model = get_peft_model(mlp(), ShiraConfig(r=1, target_modules=["lin1"], random_seed=1))
    randomize(model)
    x = torch.randn(3, 8)
    want = model(x)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x), want)
    assert model.base_model.model.lin1.cast_input_dtype_enabled
