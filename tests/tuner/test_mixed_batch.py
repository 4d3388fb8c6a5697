# SPDX-License-Identifier: Apache-2.0
"""`adapter_names=` through one base product: every layer type against each adapter on its own."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from shira import ShiraConfig, get_peft_model
from shira.errors import AdapterError, SupportError, TargetError
from shira.ops import native
from shira.tuner.layer import ShiraLayer
from shira.tuner.layers import Linear
from shira.tuner.mixed_batch import adapter_names_in_effect

from .models import EVERYTHING, everything, gpt2, llama, mlp, randomize
from .test_steps import calls

IDS = torch.randint(0, 11, (6, 4), generator=torch.Generator().manual_seed(0))
NAMES = ["de", "en", "__base__", "en", "fr", "__base__"]


needs_kernels = pytest.mark.skipif(native.load().library is None, reason=native.load().why)


def adapted(model, targets, **options):
    config = {
        name: ShiraConfig(r=2, target_modules=targets, random_seed=seed, **options)
        for seed, name in enumerate(("en", "de"))
    }
    model = get_peft_model(model, config["en"], adapter_name="en")
    model.add_adapter("de", config["de"])
    # fr is in the last layer only, so the others take its samples through the base
    model.add_adapter("fr", ShiraConfig(r=1, target_modules=[targets[-1]], random_seed=9))
    randomize(model)
    for module in model.modules():
        if isinstance(module, ShiraLayer):
            module.tuner = (model.base_model,)  # not a submodule
    return model.eval()


def by_itself(layer, x):
    return layer(x, adapter_names=NAMES)


def by_the_model(layer, x):
    """As within a forward of the model, which leaves to the next what its layers find."""
    with adapter_names_in_effect(*layer.tuner, NAMES, None):
        return layer(x)


def one_by_one(model, x, names):
    """Each sample alone through its adapter, by ``set_adapter``."""
    out = []
    for sample, name in enumerate(names):
        part = x[sample : sample + 1]
        if name == "__base__":
            with model.disable_adapter():
                out.append(model(part))
        else:
            model.set_adapter(name)
            out.append(model(part))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target", EVERYTHING)
def test_every_layer_type(target, dtype):
    model = adapted(everything(dtype=dtype), [target])
    with torch.no_grad():
        got = model(IDS, adapter_names=NAMES)
        want = one_by_one(model, IDS, NAMES)
    assert got.dtype == dtype
    if dtype is torch.bfloat16:
        # one bf16 rounding of the delta's sum apart from the merged weight's
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    else:
        torch.testing.assert_close(got, want)


def test_an_embedding_is_the_merged_tables_look_up_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(everything(dtype=dtype), ["emb"])
        table = model.base_model.model.emb
        with torch.no_grad():
            got = table(IDS, adapter_names=NAMES)
            for sample, name in enumerate(NAMES):
                if name == "__base__":
                    want = table.get_base_layer()(IDS[sample])
                else:
                    table.merge(adapter_names=[name])
                    want = table(IDS[sample])
                    table.unmerge()
                assert torch.equal(got[sample], want)


def count_products(monkeypatch):
    calls = []
    original = F.linear

    def linear(x, weight, bias=None):
        calls.append(x.shape)
        return original(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    return calls


def test_one_base_product_for_the_whole_batch(monkeypatch):
    model = adapted(mlp(), ["lin1"])
    x = torch.randn(6, 8)
    calls = count_products(monkeypatch)
    with torch.no_grad():
        model(x, adapter_names=NAMES)
    assert calls == [(6, 8), (6, 12), (6, 12)]


@needs_kernels
def test_one_call_of_the_kernel_for_each_layer_and_the_same_rows_for_all(monkeypatch):
    model = adapted(mlp(), ["lin0", "lin1"])
    seen = []
    original = native.Kernels.add_products

    def add_products(self, y, x, rows, groups, *rest):
        seen.append((rows, groups.shares[2 * groups.size :].tolist()))
        return original(self, y, x, rows, groups, *rest)

    monkeypatch.setattr(native.Kernels, "add_products", add_products)
    with torch.no_grad():
        model(torch.randn(6, 3, 8), adapter_names=NAMES)
        (first, counts), (last, counts_of_last) = seen
        assert (counts, counts_of_last) == ([3, 6], [3, 6, 3])
        assert first.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
        assert last.tolist() == [*first.tolist(), 12, 13, 14]
        model(torch.randn(6, 3, 8), adapter_names=["en", "de"] * 3)
    assert seen[2][0] is seen[3][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_the_base_are_the_base_products_bit_for_bit(dtype):
    model = adapted(mlp().to(dtype), ["lin1"])
    x = torch.randn(6, 5, 8).to(dtype)
    with torch.no_grad():
        base = model(x, adapter_names=["__base__"] * 6)
        got = model(x, adapter_names=NAMES)
        alone = [model(x, adapter_names=[n if i == at else "__base__" for i in range(6)])
                 for at, n in enumerate(NAMES)]  # fmt: skip
    for sample, name in enumerate(NAMES):
        assert torch.equal(got[sample], base[sample]) == (name == "__base__")
        if native.load().library is not None:  # nor do the other samples change an answer's bits
            assert torch.equal(got[sample], alone[sample][sample])


def test_long_groups_take_the_whole_product(monkeypatch):
    model = adapted(mlp(), ["lin1"])
    x = torch.randn(6, 10, 8)  # the longest adapted group has two samples of ten tokens
    with torch.no_grad():
        together = model(x, adapter_names=NAMES)
        monkeypatch.setattr(Linear, "whole_product_from", 20)
        calls = count_products(monkeypatch)
        apart = model(x, adapter_names=NAMES)
    assert len(calls) == 2 + 4
    torch.testing.assert_close(together, apart)
    assert torch.equal(apart[1], one_by_one(model, x, NAMES)[1])


def test_long_samples_are_multiplied_where_they_lie_each_as_if_alone(monkeypatch):
    model = adapted(mlp(), ["lin1"])
    layer, x = model.base_model.model.lin1, torch.randn(6, 10, 12)
    names = ["de", "en", "en", "__base__", "en", "de"]
    monkeypatch.setattr(Linear, "whole_product_from", 10)
    seen, original = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x) or original(x, *rest))
    with torch.no_grad():
        together = layer(x, adapter_names=names)
        assert [len(part) for part in seen] == [1, 2, 1, 1, 1]
        inside = range(x.data_ptr(), x.data_ptr() + x.numel() * 4)
        assert all(part.data_ptr() in inside for part in seen)
        for sample, name in enumerate(names):
            alone = layer(x[sample : sample + 1], adapter_names=[name])
            torch.testing.assert_close(together[sample], alone[0])


def test_layers_with_hooks_show_them_the_adapted_product():
    model = adapted(mlp(), ["lin1"])
    seen = []
    base = model.base_model.model.lin1.get_base_layer()
    base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(6, 8)
    with pytest.warns(UserWarning, match="hooks"):
        mixed = model(x, adapter_names=NAMES)
    assert sum(map(len, seen)) == 6
    torch.testing.assert_close(mixed, one_by_one(model, x, NAMES))


def test_after_a_forward_within_another_the_outer_ones_samples_are_in_effect():
    model = adapted(mlp(), ["lin0", "lin1"])
    x = torch.randn(6, 8)
    want = one_by_one(model, x, NAMES)
    inner = []

    def once_more(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = model(x[:1], adapter_names=["en"])

    with model.base_model.model.lin0.register_forward_hook(once_more):
        torch.testing.assert_close(model(x, adapter_names=NAMES), want)
    torch.testing.assert_close(inner[0], one_by_one(model, x[:1], ["en"]))
    assert model.base_model.model.lin1._samples is None


def test_an_input_without_a_row_for_each_sample_is_refused():
    layer = adapted(mlp(), ["lin1"]).base_model.model.lin1
    with pytest.raises(AdapterError, match=r"lin1.*a row for each sample"):
        layer(torch.randn(12), adapter_names=NAMES * 2)  # as many names as features


@pytest.mark.parametrize("targets", [["lin"], ["conv1d"], ["emb"]])
def test_gradients_are_those_of_the_adapters_apart(targets):
    model = adapted(everything(dtype=torch.float64), targets)
    trained = [p for n, p in model.named_parameters() if ".shira_weight." in n]
    for parameter in trained:
        parameter.requires_grad_()
    mixed = torch.autograd.grad(model(IDS, adapter_names=NAMES).square().sum(), trained)
    loss = one_by_one_with_gradients(model, IDS, NAMES).square().sum()
    apart = torch.autograd.grad(loss, trained)
    for ours, theirs in zip(mixed, apart, strict=True):
        torch.testing.assert_close(ours, theirs)


def one_by_one_with_gradients(model, x, names):
    """As `one_by_one`, through batches of one, which take the ordinary product."""
    parts = [model(x[i : i + 1], adapter_names=[name]) for i, name in enumerate(names)]
    return torch.cat(parts)


def test_under_autocast():
    model = adapted(mlp(), ["lin1"])
    x = torch.randn(6, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(x, adapter_names=NAMES)
        want = one_by_one(model, x, NAMES)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_logits_of_a_language_model(make):
    targets = ["q_proj", "v_proj", "down_proj"] if make is llama else ["wte", "c_attn", "c_proj"]
    model = adapted(make(), targets)
    ids = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=NAMES).logits
        for sample, name in enumerate(NAMES):
            alone = model(input_ids=ids[sample : sample + 1], adapter_names=[name]).logits
            torch.testing.assert_close(mixed[sample], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_an_input_of_another_dtype_is_refused_as_elsewhere(dtype):
    model = adapted(mlp(), ["lin0"])
    x = torch.ones(6, model.lin0.in_features, dtype=dtype)
    for names in (NAMES, ["fr"] * 6):
        with pytest.raises(TargetError, match=rf"the input is {dtype} but the weight is"):
            model(x, adapter_names=names)


def values_in_place(layer):
    with torch.no_grad():
        layer.shira_weight["de"].mul_(3)


def values_by_a_fused_optimizer(layer):  # which does not count its writes
    layer.shira_weight["de"].data.mul_(3)


def values_elsewhere(layer):
    layer.shira_weight["de"].data = layer.shira_weight["de"].data * 3


def values_of_another_dtype(layer):
    layer.shira_weight["de"].data = (layer.shira_weight["de"].data * 3).bfloat16()


def values_in_strides(layer):
    values = layer.shira_weight["de"]
    values.data = torch.stack((values * 3, values), 1)[:, 0]


def at_the_same_address(layer, values):
    """Let values lie there, twice as many as there are, and be called with once."""
    parameter = layer.shira_weight["de"]
    memory = torch.cat([parameter.data * 3, parameter.data * 5])
    parameter.data = memory[: parameter.numel()]
    by_the_model(layer, torch.randn(6, 8))
    parameter.data = values(memory)[: parameter.numel()]


def of_another_dtype_at_the_same_address(layer):
    def values(memory):
        return memory.view(torch.bfloat16).copy_(torch.linspace(1, 2, 2 * len(memory)))

    at_the_same_address(layer, values)


def in_strides_at_the_same_address(layer):
    at_the_same_address(layer, lambda memory: memory[::2])


def positions_in_place(layer):  # one entry a place before
    gaps = layer.shira_indices._buffers["de"]
    assert gaps.dtype == torch.uint8
    at = int(gaps[:-1].nonzero()[0])
    gaps[at] -= 1
    gaps[at + 1] += 1


def another_parameter(layer):
    layer.shira_weight["de"] = torch.nn.Parameter(torch.randn_like(layer.shira_weight["de"]))


def a_state_dict_assigned(layer):
    values = {"de": layer.shira_weight["de"].detach() * 3}
    layer.shira_weight.load_state_dict(values, strict=False, assign=True)


def other_positions(layer):
    taken = layer.shira_indices["en"]
    layer.shira_indices["de"] = taken.clone()


def an_adapter_deleted_and_added_anew(layer):
    layer.delete_adapter("de")
    support = layer.support("en")
    layer.update_layer("de", support, 2, ShiraConfig(r=2, init_weights=False))


def another_scale(layer):
    layer.set_scale("de", 3.0)


def another_dtype_and_back(layer):
    layer.to(torch.bfloat16)
    layer.to(torch.float32)
    another_scale(layer)


def values_elsewhere_during_the_forward(layer):
    def move(module, args):
        values = layer.shira_weight["de"]
        if values.sum() < 1e6:
            values.data = values.data + 1e6

    layer.register_forward_pre_hook(move)


def another_forward(layer):  # which has no product of ours
    base, forward = layer.get_base_layer(), layer.get_base_layer().forward
    values_in_place(layer)
    base.forward = lambda x: forward(x)


@pytest.mark.parametrize("call", [by_itself, by_the_model])
@pytest.mark.parametrize(
    "change",
    [
        values_in_place,
        values_by_a_fused_optimizer,
        values_elsewhere,
        values_of_another_dtype,
        values_in_strides,
        of_another_dtype_at_the_same_address,
        in_strides_at_the_same_address,
        positions_in_place,
        another_parameter,
        a_state_dict_assigned,
        other_positions,
        an_adapter_deleted_and_added_anew,
        another_scale,
        another_dtype_and_back,
        values_elsewhere_during_the_forward,
        another_forward,
    ],
)
def test_whatever_is_changed_counts_from_the_next_call_on(change, call):
    """What a layer keeps of where its adapters are never leads to what they were before."""
    layer = adapted(mlp(), ["lin0"]).base_model.model.lin0
    x = torch.randn(6, 8)
    with torch.no_grad():
        for _ in range(2):
            before = call(layer, x)
        change(layer)
        after = call(layer, x)
        torch.testing.assert_close(after[1:], before[1:], rtol=1e-2, atol=1e-2)
        assert not torch.equal(after[0], before[0])
        rows, cols = layer.shira_indices["de"]
        weight = layer.get_base_layer().weight.clone()
        weight[rows.long(), cols.long()] += layer._delta("de").float()
        want = F.linear(x[0], weight, layer.get_base_layer().bias)
    torch.testing.assert_close(after[0], want)


def test_an_adapter_that_comes_to_a_layer_counts_from_the_next_forward_on():
    layer = adapted(mlp(), ["lin0", "lin1"]).base_model.model.lin0
    x = torch.randn(6, 8)
    with torch.no_grad():
        for _ in range(2):
            before = by_the_model(layer, x)
        layer.update_layer("fr", layer.support("en"), 2, ShiraConfig(r=2, init_weights=False))
        after = by_the_model(layer, x)
    same = torch.isclose(after, before).all(1)
    assert same.tolist() == [name != "fr" for name in NAMES]


@needs_kernels
def test_positions_that_became_unusable_are_refused_in_the_next_call():
    layer = adapted(mlp(), ["lin0"]).base_model.model.lin0
    with torch.no_grad():
        by_the_model(layer, torch.randn(6, 8))
        layer.shira_indices._buffers["de"][0] = 254
        with pytest.raises(SupportError, match="out of range"):
            by_the_model(layer, torch.randn(6, 8))


@needs_kernels
def test_a_batch_of_the_same_names_finds_what_the_one_before_found():
    model = adapted(mlp(), ["lin0", "lin1"])
    tuner, x = model.base_model, torch.randn(6, 8)
    layers = [tuner.model.lin0, tuner.model.lin1]

    def found():
        (samples,) = tuner._latest_samples
        return [samples.ready[layer] for layer in layers]

    with torch.inference_mode():
        want = model(x, adapter_names=NAMES)
        first = found()
        assert torch.equal(model(x, adapter_names=NAMES), want)
        assert [*map(id, found())] == [*map(id, first)]
    # what was made in inference mode is not in the way of gradients
    x.requires_grad_()
    model(x, adapter_names=NAMES).sum().backward()
    assert x.grad is not None
    other = copy.deepcopy(model)
    assert not any(samples.ready for samples in other.base_model._latest_samples)
    with torch.no_grad():
        assert torch.equal(other(x, adapter_names=NAMES), want)
    kept = weakref.ref(layers[0].shira_weight["de"])
    del first
    model.delete_adapter("de")
    gc.collect()
    assert kept() is None


def test_a_layer_in_a_mixed_batch_takes_few_steps():
    """Steps in Python do not grow with the number of adapters but for one each."""
    counted = []
    for adapters in (2, 8):
        names = [f"task{i}" for i in range(adapters)]
        model = None
        for seed, name in enumerate(names):
            config = ShiraConfig(r=2, target_modules=["lin0"], random_seed=seed)
            if model is None:
                model = get_peft_model(mlp(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        layer = model.eval().base_model.model.lin0
        x = torch.randn(adapters, 8)
        with torch.no_grad(), adapter_names_in_effect(model.base_model, names, None):
            for _ in range(3):  # the third finds all that the first two have found
                layer(x)
            steps = calls(lambda layer=layer, x=x: layer(x))
        counted.append(len(steps))
        assert steps.count("__getattr__") == 2, steps  # torch's own, in nn.Linear.forward
    assert counted[0] <= 34, steps
    assert counted[1] <= counted[0] + 6, steps
