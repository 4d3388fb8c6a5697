# SPDX-License-Identifier: Apache-2.0
"""Modules that compute with the weight of an adapted layer themselves."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shira.errors import AdapterError, MergeError
from shira.tuner.adapted_weight import AdaptedWeight

from .merged import adapted, check_against_merged
from .models import randomize, t5

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    def __init__(self, compute) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.compute = compute

    def forward(self, x):
        return self.compute(self.fc, x)


class Product(torch.autograd.Function):
    """As fused losses do it: given the weight, it returns the weight's gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1)


READERS = {
    "linear": lambda fc, x: F.linear(x, fc.weight, fc.bias),
    "linear with another bias": lambda fc, x: F.linear(x, fc.weight, torch.ones(8)),
    "product": lambda fc, x: x @ fc.weight.T,
    "part": lambda fc, x: F.linear(x, fc.weight[2:6]),
    "chunk": lambda fc, x: F.linear(x, fc.weight.chunk(2)[1]),
    "together": lambda fc, x: F.linear(x, torch.cat([fc.weight, fc.weight])),
    "called as well": lambda fc, x: fc(x) + F.linear(x, fc.weight),
    "twice in one product": lambda fc, x: F.linear(fc.weight, fc.weight),
    "einsum": lambda fc, x: torch.einsum("bti,oi->bto", x, fc.weight),
    "convolution": lambda fc, x: F.conv1d(x.transpose(1, 2), fc.weight.unsqueeze(-1)),
    "another dtype": lambda fc, x: F.linear(x.double(), fc.weight.double()),
    "added in place": lambda fc, x: x.new_zeros(8, 8).add_(fc.weight),
    "a function": lambda fc, x: Product.apply(x, fc.weight),
    "and its data": lambda fc, x: F.linear(x, fc.weight) + F.linear(x, fc.weight.data),
}


@pytest.mark.parametrize("name", READERS)
def test_readers(name):
    torch.manual_seed(0)
    check_against_merged(Reader(READERS[name]), ["fc"], lambda model: model(X))


class Tied(nn.Module):
    """The output layer is the embedding's table, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)

    def forward(self, ids):
        return F.linear(self.embed(ids), self.embed.weight)


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight, stride=(1, 2), groups=2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class Padded(Reader):
    """A padding index counts from the end, and its row gets no gradient."""

    def __init__(self) -> None:
        super().__init__(lambda fc, ids: F.embedding(ids, fc.weight, padding_idx=-2))


def test_a_table_with_a_padding_index():
    ids = torch.tensor([[1, 6, 0], [6, 7, 1]])
    check_against_merged(Padded(), ["fc"], lambda model: model(ids))


def test_a_table_that_is_tied_by_hand():
    ids = torch.tensor([[1, 2, 0], [3, 1, 1]])
    check_against_merged(Tied(), ["embed"], lambda model: model(ids))


def test_a_kernel_that_is_read():
    x = torch.randn(2, 4, 6, 6)
    check_against_merged(Kernel(), ["conv"], lambda model: model(x))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (Attention, ["out_proj"]),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
            ["linear1", "linear2", "out_proj"],
        ),
        (
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2
            ),
            ["linear1", "linear2"],
        ),
    ],
)
def test_torchs_transformer(make, targets):
    """In eval mode torch has a fast path, which rounds otherwise; adapted layers are called."""
    torch.manual_seed(0)
    check_against_merged(make(), targets, lambda model: model(X), exactly=False)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_state_space_models(kind):
    import transformers

    torch.manual_seed(0)
    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "use_mamba_kernels": False,
    }
    if kind == "mamba":
        config = transformers.MambaConfig(**small, state_size=4, time_step_rank=4)
    elif kind == "falcon_mamba":
        config = transformers.FalconMambaConfig(**small, state_size=4, time_step_rank=4)
    else:
        config = transformers.JambaConfig(
            **small,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([[1, 2, 3, 4]])
    check_against_merged(
        model,
        ["dt_proj", "x_proj"],
        lambda model: model(input_ids=ids, use_cache=False).logits,
        exactly=False,
    )


def reading(**options):
    model = adapted(Reader(READERS["linear"]), ["fc"], **options)
    randomize(model)
    return model, model.base_model.model.fc


def test_what_is_asked_of_the_weight_is_answered_without_making_it(monkeypatch):
    _, layer = reading()
    base = layer.get_base_layer().weight
    monkeypatch.setattr(AdaptedWeight, "_plain", None)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (base.dtype, base.device, base.shape)
    assert (weight.size(0), weight.stride(), weight.dim(), weight.ndim) == (8, (8, 1), 2, 2)
    assert weight.numel() == torch.numel(weight) == 64
    assert len(weight) == 8
    assert weight.is_floating_point()
    assert not weight.is_meta
    assert weight.requires_grad
    assert weight.element_size() == 4
    with torch.no_grad():
        assert not layer.weight.requires_grad
    layer.get_base_layer().to(torch.bfloat16)
    assert weight.dtype == layer.weight.dtype == torch.bfloat16


def test_a_model_that_asks_for_the_dtype_makes_nothing(monkeypatch):
    model = adapted(t5(), ["wo", "wi"])
    monkeypatch.setattr(AdaptedWeight, "__torch_function__", None)
    monkeypatch.setattr(AdaptedWeight, "_plain", None)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()


def test_settings_of_the_base_layer_are_those_of_the_adapted_one():
    table = nn.Embedding(5, 8, padding_idx=1)
    table.offset = 2
    model = adapted(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), table), ["0", "1"])
    conv, table = model.base_model.model
    assert (conv.stride, conv.kernel_size, conv.padding_mode) == ((2, 2), (3, 3), "zeros")
    assert (table.num_embeddings, table.padding_idx, table.offset) == (5, 1, 2)
    table.get_base_layer().offset = 3
    assert table.offset == 3
    for name in ("parametrizations", "_hf_hook", "qweight", "nothing"):
        assert not hasattr(conv, name)


def test_a_reading_is_made_anew_when_something_has_changed():
    model, layer = reading()
    model(X).sum().backward()  # the first backward pass is over
    one = layer.weight
    assert layer.weight is one
    with torch.no_grad():
        assert layer.weight is not one
    for _ in range(2):  # the same reading, for any number of backward passes
        Product.apply(X, layer.weight).sum().backward()

    def check():
        assert torch.equal(layer.weight, copy.deepcopy(model).merge_and_unload().fc.weight)

    with torch.no_grad():
        layer.shira_weight["default"].mul_(2)
        check()
        layer.set_scale("default", 0.5)
        check()
        layer.shira_weight["default"] = nn.Parameter(torch.ones_like(layer.shira_weight["default"]))
        check()
        layer.get_base_layer().weight.data = torch.randn(8, 8)
        check()
        layer.get_base_layer().weight = nn.Parameter(torch.randn(8, 8).bfloat16())
        check()
        layer.get_base_layer().double()
        check()
    assert layer.weight.requires_grad
    model.requires_grad_(False)
    assert not layer.weight.requires_grad


def test_it_is_the_base_weight_itself_while_no_adapter_is_in_effect():
    model, layer = reading()
    base = layer.get_base_layer().weight
    assert layer.weight is not base
    assert not torch.equal(layer.weight, base)
    with model.disable_adapter():
        assert layer.weight is base
    want = layer.weight.clone()
    model.merge_adapter()
    assert layer.weight is base
    assert torch.equal(base, want)
    model.unmerge_adapter()
    layer.set_adapter([])
    assert layer.weight is base


def test_disabled_while_merged_it_is_the_base_weight():
    base = Reader(READERS["linear"])
    with torch.no_grad():
        want = base(X)
        model = adapted(base, ["fc"])
        randomize(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(X), want)


def test_samples_of_a_merged_model_are_refused_where_the_weight_is_only_read():
    model, layer = reading()
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged adapters \\(default\\)"):
        model.eval()(X, adapter_names=["__base__"] * 2)
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=["__base__"] * 2), layer.base_layer(X))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, layer: layer.shira_weight["default"].mul_(2),
        lambda model, layer: layer.get_base_layer().weight.mul_(2),
        lambda model, layer: model.merge_adapter(),
    ],
)
@pytest.mark.parametrize("passes", [0, 1])
def test_a_function_that_needs_it_backward_as_it_was(change, passes):
    model, layer = reading()
    x = X.clone().requires_grad_()
    for _ in range(passes):
        model(x).sum().backward()
        assert layer.weight is layer.weight
    y = Product.apply(x, layer.weight)
    (before,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.no_grad():
        change(model, layer)
    with pytest.raises(AdapterError, match=r"fc\.weight: .* written to between a forward"):
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    if layer.merged:
        model.unmerge_adapter()
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], before)


def test_the_gradient_of_its_gradient():
    _, layer = reading()
    value = layer.shira_weight["default"]

    def second(weight):
        (first,) = torch.autograd.grad(
            Product.apply(X, weight).pow(3).sum(), value, None, True, True
        )
        return torch.autograd.grad(first.sum(), value)[0]

    dense = layer.get_base_layer().weight.clone()
    rows, columns = layer.shira_indices["default"].long()
    want = second(dense.index_put((rows, columns), value, accumulate=True))
    torch.testing.assert_close(second(layer.weight), want)


def test_the_dtype_of_values_that_were_cast():
    _, layer = reading()
    for dtype in (torch.float32, torch.float64):
        layer.shira_weight.to(dtype)
        for value in layer.shira_weight.values():
            value.grad = None
        Product.apply(X, layer.weight).sum().backward()
        Product.apply(X, layer.weight).sum().backward()
        assert layer.shira_weight["default"].grad.dtype == dtype


def test_several_adapters_and_scales():
    model, layer = reading()
    config = type(model.peft_config["default"])(density=0.3, target_modules=["fc"], random_seed=1)
    model.add_adapter("other", config)
    randomize(model)
    model.base_model.set_adapter(["default", "other"])
    layer.set_scale("default", 0.5)
    output = model(X)
    output.square().sum().backward()
    got = [layer.shira_weight[name].grad.clone() for name in ("default", "other")]
    model.zero_grad()
    Product.apply(X, layer.weight).add(layer.bias).square().sum().backward()
    for name, gradient in zip(("default", "other"), got, strict=True):
        torch.testing.assert_close(layer.shira_weight[name].grad, gradient)
    model.merge_adapter()
    assert torch.equal(model(X), output)


def write(weight):
    weight[0] = 0


def assign(weight):
    weight.data = torch.zeros(8, 8)


def add(weight):
    weight += 1


WRITES = {
    "item": write,
    "data": assign,
    "in place": lambda weight: weight.mul_(2),
    "an operator": add,
    "initialization": nn.init.zeros_,
    "out": lambda weight: torch.add(torch.ones(8, 8), 1, out=weight),
    "pointer": lambda weight: weight.data_ptr(),
    "storage": lambda weight: weight.untyped_storage(),
    "hook": lambda weight: weight.register_hook(print),
    "its data in place": lambda weight: weight.data.clamp_(0, 1),
    "detached in place": lambda weight: weight.detach().clamp_(0, 1),
    "torch.detach in place": lambda weight: torch.detach(weight).clamp_(0, 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_it_is_refused(name):
    _, layer = reading()
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad(), pytest.raises(AdapterError, match=r"fc\.weight: .*cannot be written to"):
        WRITES[name](layer.weight)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_freezing_it_is_freezing_the_base_weight():
    _, layer = reading()
    layer.weight.requires_grad_(True)
    assert layer.get_base_layer().weight.requires_grad
    assert layer.weight.grad is None
    layer.weight.requires_grad = False
    assert not layer.get_base_layer().weight.requires_grad
    assert layer.shira_weight["default"].requires_grad


def test_a_trained_base_weight_gets_its_gradient():
    model, layer = reading()
    base = layer.get_base_layer().weight.requires_grad_()
    merged = copy.deepcopy(model).merge_and_unload()
    merged.fc.weight.requires_grad_()
    merged(X).square().sum().backward()
    for compute in (READERS["linear"], READERS["product"], READERS["a function"]):
        base.grad = None
        y = compute(layer, X)
        y = y if compute is READERS["linear"] else y + layer.bias
        y.square().sum().backward()
        torch.testing.assert_close(base.grad, merged.fc.weight.grad)


def test_copies_and_files_hold_no_reading():
    model, layer = reading()
    held = layer.weight
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    assert not any(isinstance(value, AdaptedWeight) for value in model.state_dict().values())
    torch.save(held, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file), held)
    assert pickle.loads(pickle.dumps(layer))._gradient_watch is None


def test_a_batch_with_several_adapters_has_no_single_weight():
    model, layer = reading()
    model.eval()
    assert torch.equal(model(X, adapter_names=["default"] * 2), model(X))
    with model.disable_adapter():
        base = model(X)
    assert torch.equal(model(X, adapter_names=["__base__"] * 2), base)
    with pytest.raises(AdapterError, match=r"fc\.weight: another module computes"):
        model(X, adapter_names=["default", "__base__"])
    assert layer._samples is None


def test_compiled():
    model, _ = reading()
    inner = model.base_model.model
    want = inner(X)
    got = torch.compile(inner, backend="aot_eager", fullgraph=True)(X)
    assert torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(torch.export.export(inner, (X,)).module()(X), want)
