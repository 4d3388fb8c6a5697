# SPDX-License-Identifier: Apache-2.0
"""Ways to quantize the linear layers of a small model, those of real libraries among them."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class StandIn(nn.Linear):
    """Packed as int8 with one scale a row; always there, whatever is installed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, StandInBackend().get_base_weight(self).to(x.dtype), self.bias)


class StandInBackend:
    supports_merge = True
    layer_type = "linear"
    backend_name = "stand-in"

    def get_base_weight(self, layer):
        return layer.weight * layer.scale

    def set_base_weight(self, peft_layer, dense):
        layer = peft_layer.get_base_layer()
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight = nn.Parameter(dense)
        packed = StandIn(linear)
        layer.weight, layer.scale = packed.weight, packed.scale


def _bnb(make):
    def quantize(model, names):
        import bitsandbytes as bnb

        for name in names:
            linear = model.get_submodule(name)
            packed = make(bnb, linear)
            packed.load_state_dict(linear.state_dict())
            model.set_submodule(name, packed.to("cpu"))  # packs

    return quantize


def _torchao(config):
    def quantize(model, names):
        import torchao.quantization as ao
        from torchao.quantization.granularity import PerGroup

        ao.quantize_(model, config(ao, PerGroup), filter_fn=lambda module, name: name in names)

    return quantize


def _stand_in(model, names):
    for name in names:
        model.set_submodule(name, StandIn(model.get_submodule(name)))


def _sizes(linear):
    return linear.in_features, linear.out_features, linear.bias is not None


QUANTIZERS = {
    "stand-in": (None, _stand_in),
    "bnb-nf4": (
        "bitsandbytes",
        _bnb(
            lambda bnb, linear: bnb.nn.Linear4bit(
                *_sizes(linear), compute_dtype=torch.float32, quant_type="nf4"
            )
        ),
    ),
    "bnb-8bit": (
        "bitsandbytes",
        _bnb(lambda bnb, linear: bnb.nn.Linear8bitLt(*_sizes(linear), has_fp16_weights=False)),
    ),
    "torchao-float8": ("torchao", _torchao(lambda ao, PerGroup: ao.Float8WeightOnlyConfig())),
    "torchao-int8": ("torchao", _torchao(lambda ao, PerGroup: ao.Int8WeightOnlyConfig())),
    "torchao-int4": (
        "torchao",
        _torchao(
            lambda ao, PerGroup: ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=PerGroup(32)
            )
        ),
    ),
}


def needs(package):
    """Skip unless the package is there."""
    missing = package is not None and importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: make test-quantized")


EVERY = [pytest.param(name, marks=needs(package)) for name, (package, _) in QUANTIZERS.items()]


def patched(monkeypatch):
    """Let PEFT's look-up know the stand-in."""
    from shira.tuner import quantized

    real = quantized.resolve_quantization_backend

    def resolve(layer, **kwargs):
        return StandInBackend() if isinstance(layer, StandIn) else real(layer, **kwargs)

    monkeypatch.setattr(quantized, "resolve_quantization_backend", resolve)
    return SimpleNamespace(resolve=resolve)
