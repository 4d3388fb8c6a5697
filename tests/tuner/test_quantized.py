# SPDX-License-Identifier: Apache-2.0
"""Adapters on packed weights: right products and gradients, nothing dense kept, merging refused.

``make test-quantized`` installs bitsandbytes and torchao and runs these; without them only the
stand-in of `quantizers` is tested.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from shira import Adapter, PeftModel, ShiraConfig, calibrate, get_peft_model
from shira.errors import MaskError, MergeError, TargetError
from shira.masks import magnitude_support
from shira.tuner.quantized import unpacked
from tests.pages import DOCS, blocks

from .models import randomize
from .quantizers import EVERY, QUANTIZERS, StandIn, StandInBackend, needs, patched

TARGETS = ["a", "b"]
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 64, bias=False)
        self.c = nn.Linear(64, 8)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.fixture(autouse=True)
def _stand_in_is_known(monkeypatch):
    patched(monkeypatch)


def plain() -> Net:
    torch.manual_seed(0)
    return Net()


def base(kind, names=("a", "b")):
    model = plain()
    QUANTIZERS[kind][1](model, list(names))
    return model


def adapted(kind, seed=1, **options):
    options = {"r": 2, "target_modules": TARGETS, "random_seed": 0, **options}
    model = get_peft_model(base(kind), ShiraConfig(**options))
    randomize(model, seed=seed)
    return model


def reference(model, x, names=("default",)):
    """The same network on dequantized weights with dense deltas, differentiable in the values."""
    net = model.base_model.model
    h = x
    for layer in (net.a, net.b):
        dense = unpacked(layer.get_base_layer()).to(x.dtype)
        for name in names:
            row, col = layer.shira_indices[name].long()
            dense = dense.index_put((row, col), layer.shira_weight[name], accumulate=True)
        h = torch.tanh(F.linear(h, dense, layer.get_base_layer().bias))
    return net.c(h)


def values_of(model, name="default"):
    net = model.base_model.model
    return [net.a.shira_weight[name], net.b.shira_weight[name]]


@pytest.mark.parametrize("kind", EVERY)
def test_product_and_gradients(kind):
    model = adapted(kind)
    x = X.clone().requires_grad_()
    got, want = model(x), reference(model, x)
    torch.testing.assert_close(got, want)
    wrt = [x, *values_of(model)]
    ours = torch.autograd.grad(got.square().sum(), wrt)
    theirs = torch.autograd.grad(want.square().sum(), wrt)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(float(gradient.abs().max()) > 0 for gradient in ours)
    layer = model.base_model.model.a
    assert layer.support("default").shape == (128, 64)
    assert layer.shira_weight["default"].dtype == torch.float32


@pytest.mark.parametrize("kind", EVERY)
def test_several_adapters_scales_and_the_base_alone(kind):
    model = adapted(kind)
    model.add_adapter("other", ShiraConfig(r=3, target_modules=TARGETS, random_seed=7))
    randomize(model, seed=2)
    model.base_model.set_adapter(["default", "other"])
    x = X.clone().requires_grad_()
    got, want = model(x), reference(model, x, ("default", "other"))
    torch.testing.assert_close(got, want)
    wrt = values_of(model) + values_of(model, "other")
    for a, b in zip(
        torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(want.sum(), wrt), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(X), base(kind)(X))
        model.set_adapter("other")
        mixed = model.eval()(X, adapter_names=["default", "other", "__base__", "other", "default"])
        each = [reference(model, X, ("default",)), reference(model, X, ("other",)), base(kind)(X)]
        want = torch.stack([each[which][row] for row, which in enumerate([0, 1, 2, 1, 0])])
        # in the base's own product bitsandbytes rounds more: activations to 8 bits, scales to bf16
        tolerance = 2e-2 if kind.startswith("bnb") else 1e-5
        torch.testing.assert_close(mixed, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", EVERY)
def test_the_packed_weight_is_never_changed(kind):
    model = adapted(kind)
    layers = [model.base_model.model.a.base_layer, model.base_model.model.b.base_layer]
    before = [(id(layer.weight), unpacked(layer)) for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    for layer, (identity, values) in zip(layers, before, strict=True):
        assert id(layer.weight) == identity
        assert torch.equal(unpacked(layer), values)


@pytest.mark.parametrize("kind", EVERY)
def test_the_dense_weight_is_made_anew_and_not_kept(kind, monkeypatch):
    model = adapted(kind)
    layer = model.base_model.model.a
    calls = []
    unpack = type(layer.quantization_backend).get_base_weight
    monkeypatch.setattr(
        type(layer.quantization_backend),
        "get_base_weight",
        lambda self, base_layer: calls.append(base_layer) or unpack(self, base_layer),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        y = layer(X.clone().requires_grad_())
    assert len(calls) == 1
    assert max(kept) <= max(X.numel(), 2 * 2 * (64 + 128)) < layer.base_layer.out_features * 64
    y.sum().backward()
    assert len(calls) == 2
    assert all(module is layer.base_layer for module in calls)


def test_a_frozen_adapter_keeps_no_input():
    model = adapted("stand-in")
    for value in values_of(model):
        value.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        model.base_model.model.a(X.clone().requires_grad_())
    assert X.shape not in kept


@pytest.mark.parametrize("kind", EVERY)
def test_merging_is_refused_before_anything_is_merged(kind):
    model = plain()
    QUANTIZERS[kind][1](model, ["b"])  # the first target is an ordinary layer
    model = get_peft_model(model, ShiraConfig(r=2, target_modules=TARGETS, random_seed=0))
    randomize(model)
    before = model.base_model.model.a.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload, model.base_model.model.b.merge):
        with pytest.raises(MergeError, match="quantized"):
            merge()
    assert torch.equal(model.base_model.model.a.base_layer.weight, before)
    assert not model.base_model.model.a.merged
    unloaded = model.unload()
    assert torch.equal(unloaded(X), model.base_model.model(X))


def packed_bits(layer):
    """The stored tensors of a packed weight, flat."""
    base = layer.get_base_layer()
    weight = base.weight
    names = getattr(weight, "tensor_data_names", None)
    parts = [getattr(weight, name) for name in names] if names else [weight.data]
    state = getattr(weight, "quant_state", None)
    parts += [state.absmax] if state is not None else []
    return [part.detach().clone() for part in parts]


def held(layer):
    """All tensors of a packed layer, the bias too."""
    base = layer.get_base_layer()
    return [*packed_bits(layer), *base.buffers(), *([] if base.bias is None else [base.bias])]


def repackable(model, kind, monkeypatch):
    """As transformers would have it: the way of packing is known to the backend."""
    if kind.startswith("torchao"):
        import torchao.quantization as ao
        from torchao.quantization.granularity import PerGroup

        how = {
            "torchao-float8": lambda: ao.Float8WeightOnlyConfig(),
            "torchao-int8": lambda: ao.Int8WeightOnlyConfig(),
            "torchao-int4": lambda: ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=PerGroup(32)
            ),
        }[kind]
        for layer in (model.base_model.model.a, model.base_model.model.b):
            layer.quantization_backend.get_apply_tensor_subclass = how


@pytest.mark.parametrize("kind", EVERY)
def test_merged_by_packing_again_where_it_is_asked_for(kind, monkeypatch):
    model = adapted(kind)
    repackable(model, kind, monkeypatch)
    net = model.base_model.model
    layers = (net.a, net.b)
    expected = []
    for layer in layers:  # PEFT's rule, by its own backend
        other = copy.deepcopy(layer.get_base_layer())
        backend = layer.quantization_backend
        dense = backend.get_base_weight(other).clone()
        row, col = layer.shira_indices["default"].long()
        dense[row, col] += layer.shira_weight["default"].detach().to(dense.dtype)
        holder = SimpleNamespace(get_base_layer=lambda other=other: other)
        backend.set_base_weight(holder, dense)
        expected.append((other, unpacked(layer.get_base_layer()), unpacked(other)))
    before, base_out = [packed_bits(layer) for layer in layers], None
    with model.disable_adapter():
        base_out = model(X)
    with pytest.warns(UserWarning, match="packing 2 quantized weights again has lost") as told:
        model.merge_adapter(requantize=True)
    lost = beside = nonzero = 0
    for layer, (other, old, new) in zip(layers, expected, strict=True):
        assert torch.equal(unpacked(layer.get_base_layer()), new)
        row, col = layer.shira_indices["default"].long()
        changed = old != new
        lost += int((~changed[row, col]).sum())
        nonzero += row.numel()
        beside += int(changed.sum() - changed[row, col].sum())
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x), other(x))
    assert f"lost {lost:,} of {nonzero:,} deltas" in str(told[0].message)
    assert f"changed {beside:,} of the other" in str(told[0].message)
    with pytest.raises(MergeError, match="unmerge first"):
        model.load_state_dict(model.state_dict())
    model.unmerge_adapter()
    for layer, bits in zip(layers, before, strict=True):
        assert all(map(torch.equal, packed_bits(layer), bits))
    with model.disable_adapter():
        assert torch.equal(model(X), base_out)
    with pytest.raises(MergeError, match="requantize=True"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="packing 2"):
        merged = model.merge_and_unload(requantize=True)
    for found, (other, _, new) in zip((merged.a, merged.b), expected, strict=True):
        assert type(found) is type(other)
        assert torch.equal(unpacked(found), new)


def test_a_failure_in_packing_again_changes_nothing(monkeypatch):
    model = adapted("stand-in")
    net = model.base_model.model
    before = [packed_bits(layer) for layer in (net.a, net.b)]
    real = StandInBackend.set_base_weight

    def fails(self, layer, dense):
        real(self, layer, dense)
        if layer is net.b:
            raise RuntimeError("no kernel")

    monkeypatch.setattr(StandInBackend, "set_base_weight", fails)
    with pytest.raises(MergeError, match=r"b\.weight: RuntimeError in packing it again: no kernel"):
        model.merge_adapter(requantize=True)
    assert not net.a.merged
    assert not net.b.merged
    for layer, bits in zip((net.a, net.b), before, strict=True):
        assert all(map(torch.equal, packed_bits(layer), bits))
    with torch.no_grad():
        net.a.shira_weight["default"][0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(requantize=True, safe_merge=True)
    assert all(map(torch.equal, packed_bits(net.a), before[0]))


@pytest.mark.filterwarnings("ignore:packing")
def test_what_is_packed_again_can_be_scaled_after_another_merge_was_refused():
    model = adapted("stand-in")
    model.add_adapter("two", ShiraConfig(r=2, target_modules=TARGETS, random_seed=5))
    net = model.base_model.model
    before = packed_bits(net.a)
    model.merge_adapter(["default"], requantize=True)
    with pytest.raises(MergeError, match="requantize=True"):
        model.merge_adapter(["two"])
    net.a.set_scale("default", 0.0)
    assert net.a.merged_adapters == ["default"]
    assert all(map(torch.equal, packed_bits(net.a), before))


@pytest.mark.parametrize("unload", [False, True])
def test_a_warning_of_packing_that_is_an_error_leaves_all_as_it_was(unload):
    model = adapted("stand-in")
    net = model.base_model.model
    layers, before = (net.a, net.b), [packed_bits(layer) for layer in (net.a, net.b)]
    merge = model.merge_and_unload if unload else model.merge_adapter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="packing 2"):
            merge(requantize=True)
    assert (net.a, net.b) == layers
    assert net.peft_config is model.base_model.peft_config
    for layer, bits in zip(layers, before, strict=True):
        assert not layer.merged
        assert not layer.requantize
        assert all(map(torch.equal, packed_bits(layer), bits))
    with pytest.raises(MergeError, match="requantize=True"):
        model.merge_adapter()


MOVES = {
    "half and back": lambda model: model.half().float(),
    "to bfloat16": lambda model: model.bfloat16(),
    "to another device": lambda model: model.to("meta"),
}


@pytest.mark.filterwarnings("ignore:packing")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", EVERY)
def test_a_model_that_is_moved_while_packed_again(kind, move, monkeypatch):
    """What comes back is the packed weight of before, moved as a model that was never merged."""
    if kind.startswith("bnb") and "device" in move:
        pytest.skip("bitsandbytes itself cannot be moved to the meta device")
    model, plain = adapted(kind), adapted(kind)
    repackable(model, kind, monkeypatch)
    model.merge_adapter(requantize=True)
    MOVES[move](plain)
    MOVES[move](model)
    model.unmerge_adapter()
    for name in TARGETS:
        layer, want = (m.base_model.model.get_submodule(name) for m in (model, plain))
        for one, other in zip(held(layer), held(want), strict=True):
            assert (one.dtype, one.device) == (other.dtype, other.device)
            assert one.is_meta or torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:packing")
def test_unmerging_a_packed_weight_leaves_the_mode_as_it_is():
    model = adapted("stand-in").train()
    model.merge_adapter(requantize=True)
    model.eval()
    model.unmerge_adapter()
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:packing")
def test_a_second_adapter_is_packed_with_the_first_from_the_original(monkeypatch):
    model = adapted("stand-in")
    model.add_adapter("two", ShiraConfig(r=2, target_modules=TARGETS, random_seed=5))
    randomize(model)
    net = model.base_model.model
    before = packed_bits(net.a)
    model.merge_adapter(["default"], requantize=True)
    model.merge_adapter(["two"], requantize=True)
    assert net.a.merged_adapters == ["default", "two"]
    one_by_one = packed_bits(net.a)
    model.unmerge_adapter()
    assert all(map(torch.equal, packed_bits(net.a), before))
    model.merge_adapter(["default", "two"], requantize=True)
    assert all(map(torch.equal, packed_bits(net.a), one_by_one))
    net.a.set_scale("two", 0.0)
    net.b.set_scale("two", 0.0)
    without = packed_bits(net.a)
    model.unmerge_adapter()
    model.merge_adapter(["default"], requantize=True)
    assert all(map(torch.equal, packed_bits(net.a), without))


@pytest.mark.parametrize("kind", [pytest.param("torchao-int8", marks=needs("torchao"))])
def test_a_model_quantized_by_hand_is_not_packed_again(kind):
    model = adapted(kind)
    with pytest.raises(MergeError, match="quantized by hand"):
        model.merge_adapter(requantize=True)


class OneScale(nn.Linear):
    """A linear layer of 8-bit numbers beside a scale that only its own forward knows."""

    def __init__(self, dtype) -> None:
        super().__init__(64, 64)
        weight = (torch.randn(64, 64) * 8).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.full((1,), 0.01), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_weights_of_8_bits_that_nobody_can_unpack_are_refused_when_matched(dtype):
    model = nn.Sequential(OneScale(dtype), nn.Linear(64, 4))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TargetError, match=name):
        get_peft_model(model, ShiraConfig(r=2, target_modules=["0"]))
    assert type(model[0]) is OneScale


def test_the_float8_layer_of_transformers_is_refused_when_matched():
    fp8 = "transformers.integrations.finegrained_fp8"  # some releases need Triton to import it
    FP8Linear = pytest.importorskip(fp8, exc_type=ImportError).FP8Linear
    model = nn.Sequential(FP8Linear(128, 128, block_size=(128, 128)), nn.Linear(128, 4))
    with pytest.raises(TargetError, match="float8_e4m3fn"):
        get_peft_model(model, ShiraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("kind", EVERY)
def test_saved_and_loaded(tmp_path, kind):
    model = adapted(kind).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(kind), tmp_path)
    assert torch.equal(again(X), model(X))
    adapter = Adapter.from_model(model)
    assert Adapter.load(tmp_path) == adapter
    assert adapter["a.weight"].support.shape == (128, 64)
    assert model.peft_config["default"].base_fingerprint is None  # packed: no values to hash
    on_plain = PeftModel.from_pretrained(plain(), tmp_path)
    torch.testing.assert_close(on_plain(X), model(X), rtol=0.5, atol=0.5)


@pytest.mark.parametrize("kind", EVERY)
def test_masks(kind):
    model = adapted(kind, mask_type="magnitude")
    values = unpacked(model.base_model.model.a.base_layer)
    assert model.base_model.model.a.support("default") == magnitude_support(values, 2 * (64 + 128))
    config = ShiraConfig(r=2, target_modules=TARGETS, mask_type="snip")

    def loss_fn(net, batch):
        return net(batch).square().mean()

    with pytest.raises(TargetError, match="calibrate on the unquantized model"):
        calibrate(base(kind), config, [X], loss_fn=loss_fn)
    chosen = calibrate(plain(), config, [X], loss_fn=loss_fn)
    supports = chosen.mask_fn.supports
    model = get_peft_model(base(kind), chosen)
    assert model.base_model.model.b.support("default") == supports["b.weight"]


@pytest.mark.parametrize("kind", EVERY)
def test_dtypes(kind):
    """bfloat16 activations: deltas stay float32, and are added in the dtype of the product."""
    model = adapted(kind)
    layer = model.base_model.model.b
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    compute = getattr(layer.base_layer, "compute_dtype", None) or torch.bfloat16
    y = layer(x)
    assert y.dtype == torch.bfloat16
    dense = unpacked(layer.base_layer).to(compute)
    row, col = layer.shira_indices["default"].long()
    delta = layer.shira_weight["default"].detach()
    dense[row, col] = (dense[row, col].float() + delta).to(compute)
    assert torch.equal(y, F.linear(x.to(compute), dense).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.shira_weight["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("kind", EVERY)
def test_autocast_and_checkpointing(kind):
    from torch.utils.checkpoint import checkpoint

    model = adapted(kind)
    want = torch.autograd.grad(model(X).square().sum(), values_of(model))
    for reentrant in (True, False):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        for value, gradient in zip(values_of(model), want, strict=True):
            assert torch.equal(value.grad, gradient)
            value.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(model, X), rtol=0.1, atol=0.1)
    y.sum().backward()
    assert values_of(model)[0].grad.dtype == torch.float32


@pytest.mark.parametrize("kind", EVERY)
def test_compiling_breaks_the_graph_and_changes_nothing(kind):
    model = adapted(kind)
    compiled = torch.compile(model, backend="eager")
    got = torch.autograd.grad(compiled(X).square().sum(), values_of(model))
    want = torch.autograd.grad(model(X).square().sum(), values_of(model))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_bias_that_is_trained():
    model = adapted("stand-in")
    bias = model.base_model.model.a.base_layer.bias.requires_grad_()
    got = torch.autograd.grad(model(X).square().sum(), bias)[0]
    torch.testing.assert_close(
        got, torch.autograd.grad(reference(model, X).square().sum(), bias)[0]
    )


@pytest.mark.parametrize("kind", EVERY)
def test_gradients_of_gradients_and_torch_func(kind):
    model = adapted(kind)
    values = {n: p for n, p in model.named_parameters() if ".shira_weight." in n}
    x = X.clone().requires_grad_()
    bias = model.base_model.model.a.base_layer.bias.requires_grad_()
    for wanted in ([x], [*values.values()], [x, bias, *values.values()]):
        second = []
        for loss in (model(x).square().mean(), reference(model, x).square().mean()):
            first = torch.autograd.grad(loss, wanted, create_graph=True)
            penalty = sum(each.square().sum() for each in first)
            second += [[*first, *torch.autograd.grad(penalty, wanted)]]
        for ours, theirs in zip(*second, strict=True):
            torch.testing.assert_close(ours, theirs)

    def call(values, x):
        return functional_call(model, values, (x,)).square().mean()

    plain_values = {name: value.detach() for name, value in values.items()}
    got = vmap(grad(call), (None, 0))(plain_values, X[:, None])
    for at in range(len(X)):
        loss = reference(model, X[at : at + 1]).square().mean()
        for name, want in zip(values, torch.autograd.grad(loss, [*values.values()]), strict=True):
            torch.testing.assert_close(got[name][at], want)
    direction = {name: torch.ones_like(value) for name, value in values.items()}
    _, along = jvp(lambda v: call(v, X), (plain_values,), (direction,))
    slopes = torch.autograd.grad(reference(model, X).square().mean(), [*values.values()])
    torch.testing.assert_close(along, sum(slope.sum() for slope in slopes))


def test_copies():
    model = adapted("stand-in")
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_a_weight_that_cannot_be_unpacked_has_no_magnitudes(monkeypatch):
    monkeypatch.setattr(StandInBackend, "supports_merge", False)
    with pytest.raises(MaskError, match=r"a\.weight: .*cannot be unpacked"):
        adapted("stand-in", mask_type="magnitude")
    model = adapted("stand-in")  # by position, with a second product on the delta alone
    monkeypatch.setattr(StandInBackend, "supports_merge", True)
    torch.testing.assert_close(model(X), reference(model, X))


def test_an_unpacked_weight_of_another_shape_is_refused(monkeypatch):
    model = adapted("stand-in")
    monkeypatch.setattr(
        StandInBackend, "get_base_weight", lambda self, layer: layer.weight.float().t()
    )
    with pytest.raises(TargetError, match=r"\(64, 128\), not \(128, 64\)"):
        model(X)


@pytest.mark.parametrize("nested", [False, True])
@needs("bitsandbytes")
def test_what_bitsandbytes_packs_anew_to_infer_on_a_cpu(nested):
    """Its 4-bit layers change their layout in eval mode, which its dequantization cannot read."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    linear = plain().a
    layer = bnb.nn.Linear4bit(
        64, 128, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested
    )
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu")
    assert layer.weight.quant_state.nested == nested
    before = unpacked(layer)
    layer.weight.data, _ = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    after = unpacked(layer)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)  # scales in bfloat16


def _loaded_quantized(kind, path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if kind == "bnb-nf4":
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True
        )
    elif kind == "bnb-8bit":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        how = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bnb-nf4", marks=needs("bitsandbytes")),
        pytest.param("bnb-8bit", marks=needs("bitsandbytes")),
        pytest.param("torchao-int8", marks=needs("torchao")),
    ],
)
def test_a_model_that_transformers_quantizes(tmp_path, kind):
    from peft import prepare_model_for_kbit_training
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    ids = torch.randint(64, (2, 9))
    model = prepare_model_for_kbit_training(
        _loaded_quantized(kind, tmp_path / "base"),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = get_peft_model(
        model, ShiraConfig(r=2, target_modules="all-linear", random_seed=0)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        _loaded_quantized(kind, tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_what_the_page_shows(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"vocab_size": 32, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained("some/model")
    page = DOCS / "quantized.md"
    shown: dict[str, object] = {}
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), shown)
    model = shown["model"]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer.get_base_layer()).__name__ == "Linear4bit"
    ids = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_layer_that_has_its_packed_weight_under_another_name_is_refused():
    """As HQQ's."""
    model = base("stand-in")
    model.a.W_q = model.a.weight
    del model.a.weight
    with pytest.raises(TargetError, match=r"a: StandIn \(stand-in\) keeps its packed weight under"):
        get_peft_model(model, ShiraConfig(r=1, target_modules=["a"]))
    assert isinstance(model.a, StandIn)
