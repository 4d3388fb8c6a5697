# SPDX-License-Identifier: Apache-2.0
"""Layers whose class has a forward of its own, and what torch's own take besides a batch."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shira.errors import AdapterError, TargetError

from .merged import adapted, assert_equal, check_against_merged
from .models import randomize

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 2, 0], [3, 1, 1]])
IMAGE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-0.5, 0.5).to(self.weight.dtype)).float()


class Turned(nn.Linear):
    """Reads its weight twice, neither time in F.linear."""

    def forward(self, x):
        return x @ self.weight.t() + self.weight.sum(1)


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return torch.sigmoid(logits), {"logits": logits, "best": logits.argmax(-1)}


class Grouped(nn.Linear):
    def forward(self, x):
        weight = self.weight.view(2, 4, 8)
        return torch.einsum("bti,goi->btgo", x, weight)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sign() * weight.abs().mean()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Bits(nn.Linear):
    """As BitNet's: the weight goes through a Function, whose backward gives its dense gradient."""

    def forward(self, x):
        return F.linear(x, StraightThrough.apply(self.weight), self.bias)


class Same(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 1, "same", 1, self.groups)


class Strided(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight, self.bias, stride=2, padding=(1, 0))


class Halved(nn.Conv2d):
    """Its forward is torch's, what that calls is not."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / 2, bias)


class Causal(nn.Conv1d):
    def forward(self, x):
        x = F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0))
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Upsample(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, None, 2, 1, 1, self.groups, 2)[..., 1:]


class Offset(nn.Embedding):
    """As BART's positions: neither one argument, nor the ids first."""

    def forward(self, length, *, start=0):
        return super().forward(torch.arange(start, start + length))


LAYERS = {
    "scaled": (lambda: Scaled(8, 8), X),
    "turned": (lambda: Turned(8, 8), X),
    "router": (lambda: Router(8, 4), X),
    "grouped": (lambda: Grouped(8, 8), X),
    "bits": (lambda: Bits(8, 8), X),
    "clamped in bfloat16": (lambda: Clamped(8, 8).bfloat16(), X),
    "same": (lambda: Same(3, 6, 3), IMAGE),
    "strided": (lambda: Strided(3, 6, 3), IMAGE),
    "halved": (lambda: Halved(3, 6, 3), IMAGE),
    "causal": (lambda: Causal(4, 6, 3, dilation=2, groups=2), X),
    "upsample": (lambda: Upsample(3, 6, 3, groups=3), IMAGE),
    "scaled gradient": (lambda: nn.Embedding(5, 8, scale_grad_by_freq=True), IDS),
    "sparse gradient": (lambda: nn.Embedding(5, 8, sparse=True, padding_idx=-5), IDS),
    # what torch's own layers take besides a batch
    "one vector": (lambda: nn.Linear(8, 8), X[0, 0]),
    "one image": (lambda: nn.Conv2d(3, 6, 3), IMAGE[0]),
    "one image, reflected": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        IMAGE[0],
    ),
    "one image, padded": (lambda: nn.Conv2d(3, 6, 3, padding="same"), IMAGE[0]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_own_forwards(name):
    torch.manual_seed(0)
    make, x = LAYERS[name]
    check_against_merged(nn.Sequential(make()), ["0"], lambda model: model(x))


def real_layers():
    from transformers.models.bart.modeling_bart import (
        BartLearnedPositionalEmbedding,
        BartScaledWordEmbedding,
    )
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
    from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    try:
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
    except ModuleNotFoundError:  # transformers of today has it
        grouped = []
    else:
        grouped = [(DeepseekV4GroupedLinear(8, 12, 2), lambda layer: layer(X.unflatten(1, (2, 2))))]
    config = Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    return [
        (WeightStandardizedConv2d(3, 6, 3, padding=1), lambda layer: layer(IMAGE)),
        (Gemma3TextScaledWordEmbedding(5, 8, 0, 3.0), lambda layer: layer(IDS)),
        (BartScaledWordEmbedding(5, 8, 0, 3.0), lambda layer: layer(IDS)),
        (BartLearnedPositionalEmbedding(9, 8), lambda layer: layer(IDS, 1, position_ids=None)),
        (Llama4Router(config), lambda layer: layer(X.flatten(0, 1))),
        *grouped,
        (IdeficsDecoupledLinear(8, 8, out_additional_features=2), lambda layer: layer(X)),
    ]


def test_own_forwards_of_real_models():
    torch.manual_seed(0)
    for layer, call in real_layers():
        with torch.no_grad():
            for parameter in layer.parameters():  # some are made without values
                parameter.normal_()
        check_against_merged(nn.Sequential(layer), ["0"], lambda model, call=call: call(model[0]))


def test_arguments_are_passed_on():
    check_against_merged(
        nn.Sequential(Offset(9, 8)), ["0"], lambda model: model[0](length=3, start=2)
    )
    check_against_merged(nn.Sequential(nn.Linear(8, 8)), ["0"], lambda model: model[0](input=X))
    layer = adapted(nn.Sequential(nn.Linear(8, 8)), ["0"]).base_model.model[0]
    with pytest.raises(TypeError, match="too many positional arguments"):
        layer(X, X)
    with pytest.raises(TypeError, match="labels"):
        layer(X, labels=X)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(8, 8), torch.zeros(0, 8)),
        (lambda: nn.Linear(8, 8), torch.zeros(3, 0, 8)),
        (lambda: Turned(8, 8), torch.zeros(0, 4, 8)),
        (lambda: nn.Conv2d(3, 6, 3), torch.zeros(0, 3, 5, 5)),
        (lambda: nn.Embedding(5, 8), torch.zeros(0, 3, dtype=torch.long)),
    ],
)
def test_an_empty_batch(make, x):
    base = nn.Sequential(make())
    want = base(x)
    model = adapted(base, ["0"])
    got = model(x)
    assert got.shape == want.shape
    got.sum().backward()
    assert not model.base_model.model[0].shira_weight["default"].grad.any()


def test_float64_under_autocast_is_torchs():
    base = nn.Sequential(nn.Linear(8, 8)).double()
    with torch.autocast("cpu", torch.bfloat16):
        check_against_merged(base, ["0"], lambda model: model(X.double()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_refused(dtype):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    before = base[0]
    with pytest.raises(TargetError, match=f"0: its weight is {dtype}"):
        adapted(base, ["0"], r=1, density=None)
    assert base[0] is before


def test_a_part_called_as_peft_calls_adapted_layers_is_refused():
    base = nn.Sequential(nn.Linear(8, 8))
    base.add_module("base_layer", nn.Linear(8, 8))
    with pytest.raises(TargetError, match=r"root \(Sequential\) has a part called 'base_layer'"):
        adapted(base, ["0"])
    assert type(base[0]) is nn.Linear


def test_the_output_may_be_written_to():
    for layer, x in [(nn.Linear(8, 8), X), (nn.Embedding(5, 8), IDS), (Scaled(8, 8), X)]:
        model = adapted(nn.Sequential(layer), ["0"])
        y = model(x)
        y *= 2
        y.sum().backward()
        assert model.base_model.model[0].shira_weight["default"].grad.any()


def test_hooks_of_a_layer_with_its_own_forward():
    base = nn.Sequential(Scaled(8, 8))
    model = adapted(base, ["0"])
    randomize(model)
    layer = model.base_model.model[0]
    want, seen = layer(X), []
    layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(module))
    with pytest.warns(UserWarning, match="hooks"):
        got = layer(X)
    bias = 3 * layer.bias
    torch.testing.assert_close(got - bias, 2 * (want - bias))
    assert seen == [layer.base_layer]


def test_a_forward_that_was_set_on_the_layer_itself():
    base = nn.Sequential(nn.Linear(8, 8))
    model = adapted(base, ["0"])
    randomize(model)
    layer = model.base_model.model[0]
    want = layer(X)
    original = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * original(x)
    assert torch.equal(layer(X), 2 * want)
    assert layer.base_layer.forward.__name__ == "<lambda>"


def test_the_weight_is_put_back_when_the_forward_fails():
    class Fails(nn.Linear):
        def forward(self, x):
            if x is None:
                raise KeyboardInterrupt
            return super().forward(x)

    model = adapted(nn.Sequential(Fails(8, 8)), ["0"])
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight
    with pytest.raises(KeyboardInterrupt):
        layer(None)
    assert layer.base_layer.weight is weight
    assert layer.base_layer._parameters["weight"] is weight
    assert "forward" not in layer.base_layer.__dict__


def test_threads_do_not_see_one_anothers_weight():
    model = adapted(nn.Sequential(Turned(64, 64)), ["0"])
    randomize(model)
    x = torch.randn(4, 64)
    want, weight, wrong = model(x), model.base_model.model[0].base_layer.weight, []

    def run():
        for _ in range(30):
            if not torch.equal(model(x), want):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.base_model.model[0].base_layer.weight is weight


def test_a_mixed_batch():
    names = ["default", "other", "__base__", "other"]
    x = torch.randn(4, 8)
    for layer in (Scaled(8, 8), Bits(8, 8)):
        model = adapted(nn.Sequential(layer), ["0"])
        config = model.peft_config["default"]
        model.add_adapter("other", type(config)(density=0.3, target_modules=["0"], random_seed=1))
        randomize(model)
        model.eval()
        got = model(x, adapter_names=names)
        for sample, name in enumerate(names):
            want = model(x[sample : sample + 1], adapter_names=[name])
            torch.testing.assert_close(got[sample : sample + 1], want)
        model.set_adapter("other")
        assert torch.equal(model(x, adapter_names=["other"] * 4), model(x))


def test_a_mixed_batch_that_cannot_be_split_is_refused():
    class More(nn.Linear):
        def forward(self, x, factor=None):
            y = super().forward(x)
            return y if factor is None else y * factor

    model = adapted(nn.Sequential(Router(8, 8), More(8, 8)), ["0", "1"]).eval()
    router, more = model.base_model.model
    x, names = torch.randn(2, 8), ["default", "__base__"]
    assert_equal(router(x, adapter_names=["default"] * 2), router(x))
    with pytest.raises(AdapterError, match=r"0\.weight: the forward of Router does not return"):
        router(x, adapter_names=names)
    assert torch.equal(more(x, adapter_names=names), more(x, None, adapter_names=names))
    with pytest.raises(AdapterError, match=r"1\.weight: the forward of More takes further"):
        more(x, x, adapter_names=names)


def test_compiled():
    for make in (Scaled, Turned):
        torch._dynamo.reset()
        model = adapted(nn.Sequential(make(8, 8)), ["0"]).base_model.model
        randomize(model)
        (value,) = [p for p in model.parameters() if p.requires_grad]
        want = model(X)
        (gradient,) = torch.autograd.grad(want.sum(), value)
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(X)
        assert torch.equal(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), value)[0], gradient)
