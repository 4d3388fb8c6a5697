# SPDX-License-Identifier: Apache-2.0
"""The one question about any layer: is an adapter what its merged model is?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shira import ShiraConfig, get_peft_model
from shira.tuner import ShiraLayer

from .models import randomize


def tensors(output) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_equal(got, want, exactly=True):
    assert len(tensors(got)) == len(tensors(want)) > 0
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert one.dtype == other.dtype
        if exactly:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def loss_of(output) -> Tensor:
    return sum(t.double().square().sum() for t in tensors(output) if t.requires_grad)


def shira_layers(model) -> dict[str, ShiraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ShiraLayer)
    }


def adapted(base, targets, **options):
    options.setdefault("density", 0.5)
    return get_peft_model(base, ShiraConfig(target_modules=targets, random_seed=0, **options))


def check_against_merged(base, targets, call, exactly=True, **options):
    """Untrained nothing is changed; filled, output and gradient are those of the merged model.

    Args:
        base: The base model.
        targets: ``target_modules``.
        call: ``call(model)`` is an output of any structure.
        exactly: Whether the bits are to be equal; else within rounding.
        **options: Of the config.
    """
    with torch.no_grad():
        before = call(base.eval())
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, targets, **options)
    inner = model.base_model.model
    with torch.no_grad():
        assert_equal(call(inner.eval()), before, exactly)
    randomize(model, scale=1.0)
    output = call(inner.train())
    loss_of(output).backward()
    with torch.no_grad():
        assert_equal(call(inner.eval()), output, exactly)
    merged = copy.deepcopy(model).merge_and_unload().train()
    for name in shira_layers(model):
        merged.get_submodule(name).weight.requires_grad_(True)
    want = call(merged)
    assert_equal(output, want, exactly)
    assert any(not torch.equal(a, b) for a, b in zip(tensors(want), tensors(before), strict=True))
    loss_of(want).backward()
    for name, layer in shira_layers(model).items():
        gradient = merged.get_submodule(name).weight.grad
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        rows, cols = layer.shira_indices["default"].long()
        got = layer.shira_weight["default"].grad
        want = dense.flatten(1)[rows, cols]
        rounding = 1e-2 if want.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(got, want.to(got.dtype), rtol=rounding, atol=rounding)
    for name, value in model.unload().state_dict().items():
        assert torch.equal(value, weights[name]), name
