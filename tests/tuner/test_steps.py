# SPDX-License-Identifier: Apache-2.0
"""What a layer's call costs besides its products, counted in calls of Python functions; and that
the short way to what the layer needs never leads to what it was before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from shira import ShiraConfig, get_peft_model
from shira.ops import native

SHIRA = str(Path(shira.__file__).parent)


def adapted_linear(adapters=("default",), **config):
    torch.manual_seed(0)
    model = None
    for seed, name in enumerate(adapters):
        made = ShiraConfig(
            r=4, target_modules=["0"], random_seed=seed, init_weights=False, **config
        )
        if model is None:
            base = nn.Sequential(nn.Linear(64, 64))
            model = get_peft_model(base, made, adapter_name=name)
        else:
            model.add_adapter(name, made)
    model.base_model.set_adapter(list(adapters))
    return model.base_model.model[0]


def calls(function):
    """Names of the functions of shira that are called, and of torch's slow look-up."""
    seen = []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and (
            code.co_filename.startswith(SHIRA) or code is nn.Module.__getattr__.__code__
        ):
            seen.append(code.co_name)

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return [name for name in seen if name not in ("<listcomp>", "<genexpr>")]


@pytest.mark.skipif(native.load().library is None, reason="other ways take other steps")
@pytest.mark.parametrize("options", [{}, {"mask_type": "block", "mask_options": {"block_size": 8}}])
def test_a_call_takes_few_steps(options):
    layer = adapted_linear(**options)
    x = torch.randn(4, 64, requires_grad=True)
    for _ in range(2):  # the first call makes the plan
        layer(x).sum().backward()
    y = None

    def forward():
        nonlocal y
        y = layer(x)

    steps = calls(forward)
    assert len(steps) <= 32, steps
    assert steps.count("__getattr__") == 0
    steps = calls(lambda: y.sum().backward())
    assert len(steps) <= 24, steps


def product(layer, x, names=("default",)):
    weight = layer.base_layer.weight.detach().clone()
    for name in names:
        rows, cols = layer.shira_indices[name]
        weight[rows.long(), cols.long()] += layer.scaling[name] * layer.shira_weight[name].detach()
    return nn.functional.linear(x, weight, layer.base_layer.bias)


def another_scale(layer):
    layer.set_scale("default", 0.5)


def another_parameter(layer):
    layer.shira_weight["default"] = nn.Parameter(torch.randn(512))


def a_plain_tensor_in_its_place(layer):  # as FSDP1 does
    values = layer.shira_weight["default"].detach() * 2
    del layer.shira_weight._parameters["default"]
    layer.shira_weight.default = values


def other_positions(layer):
    layer.shira_indices["default"] = layer.shira_indices["default"].flip(0)[
        :, layer.shira_indices["default"].flip(0)[0].argsort(stable=True)
    ]


def another_base_layer(layer):
    layer.base_layer = nn.Linear(64, 64)


def another_weight(layer):
    layer.base_layer.weight.data = torch.randn(64, 64)


def a_plain_weight_in_its_place(layer):
    weight = layer.base_layer.weight.detach() * 2
    del layer.base_layer.weight
    layer.base_layer.weight = weight


@pytest.mark.parametrize(
    "change",
    [
        another_scale,
        another_parameter,
        a_plain_tensor_in_its_place,
        other_positions,
        another_base_layer,
        another_weight,
        a_plain_weight_in_its_place,
    ],
)
def test_whatever_is_changed_counts_from_the_next_call_on(change):
    layer, x = adapted_linear(), torch.randn(4, 64)
    before = layer(x)
    torch.testing.assert_close(before, product(layer, x))
    change(layer)
    after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, product(layer, x))


def test_hooks_and_other_adapters_count_from_the_next_call_on():
    layer, x = adapted_linear(("default", "second")), torch.randn(4, 64)
    torch.testing.assert_close(layer(x), product(layer, x, ("default", "second")))
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), product(layer, x, ("second",)))
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda *args: seen.append(args[-1]))
    with pytest.warns(UserWarning, match="hooks"):
        assert torch.equal(layer(x), seen[0])
    handle.remove()
    layer(x)
    assert len(seen) == 1
    layer.delete_adapter("second")
    torch.testing.assert_close(layer(x), product(layer, x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
