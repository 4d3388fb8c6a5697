# SPDX-License-Identifier: Apache-2.0
"""What a layer's call costs besides its products, counted in calls of Python functions and, where
torch computes, in kernels; that it never waits for the device; and that the short way to what the
layer needs never leads to what it was before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import shira
from shira import ShiraConfig, get_peft_model
from shira.ops import gaps, native, product

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


class Kernels(TorchDispatchMode):
    """Names of the ops that run, but for views and allocations; refuses those that would wait."""

    NONE = frozenset(
        [
            "alias",
            "as_strided",
            "detach",
            "empty",
            "empty_like",
            "empty_strided",
            "expand",
            "new_empty",
            "permute",
            "_reshape_alias",
            "select",
            "set_",
            "slice",
            "squeeze",
            "t",
            "transpose",
            "_unsafe_view",
            "unsqueeze",
            "view",
        ]
    )
    WAITS = frozenset(
        [
            "_local_scalar_dense",
            "equal",
            "is_nonzero",
            "item",
            "masked_select",
            "nonzero",
            "repeat_interleave",
            "unique_consecutive",
            "unique_dim",
            "_unique",
            "_unique2",
        ]
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        masks = [
            t
            for t in torch.utils._pytree.tree_leaves(args[1:])
            if isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
        ]
        assert name not in self.WAITS, f"{name} waits for the device"
        assert not (name.startswith("index") and masks), f"{name} by a mask waits for the device"
        if name not in self.NONE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def unpacked(layer, name="default"):
    """Give it positions as it has them on a GPU: rows and columns."""
    indices = layer.shira_indices[name]
    support = gaps.support_of(indices, layer.weight_shape)
    layer.shira_indices[name] = support.coordinates().int().contiguous()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The way of a GPU: no compiled kernels, dense products in pieces, ops one by one."""
    monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "for a test"))
    monkeypatch.setattr(product, "runs_eagerly", lambda *tensors: True)
    monkeypatch.setenv("SHIRA_BACKEND", "chunked")


PUT_IN = ["index_select", "add", "index_copy_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_launches_few_kernels(on_a_gpu, dtype):
    layer = adapted_linear().to(dtype)
    layer.shira_weight.float()
    unpacked(layer)
    layer.base_layer.bias = None
    x = torch.randn(2, 4, 64, dtype=dtype, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    with Kernels() as kernels:
        y = layer(x)
    assert kernels.names == [*PUT_IN, "mm", "index_copy_"]
    grad = torch.ones_like(y)
    with Kernels() as kernels:
        torch.autograd.grad(y, [x, layer.shira_weight["default"]], grad)
    names = kernels.names
    if dtype == torch.bfloat16:  # which the CPU multiplies in float32
        assert names[:2] == ["_to_copy", "_to_copy"]
        names = names[2:]
    assert names == ["mm", "index_select", *PUT_IN, "mm", "index_copy_"]


def test_a_step_with_blocks_launches_few_kernels(on_a_gpu, monkeypatch):
    monkeypatch.setenv("SHIRA_BACKEND", "tiles")
    layer = adapted_linear(mask_type="block", mask_options={"block_size": 8})
    unpacked(layer)
    x = torch.randn(2, 4, 64, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    y = layer(x)
    grad = torch.ones_like(y)
    with Kernels() as kernels:
        torch.autograd.grad(y, [x, layer.shira_weight["default"]], grad)
    of_tiles = ["index_select", "index_select", "bmm", "index_select"]
    assert kernels.names == [*of_tiles, *PUT_IN, "mm", "index_copy_"]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "tiles"])
def test_no_step_waits_for_the_device(on_a_gpu, monkeypatch, backend, pieces):
    """So that steps can be launched ahead, and captured in a CUDA graph."""
    monkeypatch.setenv("SHIRA_BACKEND", backend)
    if pieces:
        monkeypatch.setenv("SHIRA_SCRATCH_BYTES", "2048")
    torch.manual_seed(0)
    base = nn.Sequential(
        *(nn.Embedding(64, 64, padding_idx=1), nn.Linear(64, 64)),
        *(nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 8, 8, stride=8), nn.Flatten()),
    )
    model = None
    for seed, name in enumerate(("first", "second")):
        made = ShiraConfig(
            density=0.25, target_modules=["0", "1", "3"], random_seed=seed, init_weights=False,
            mask_type="block", mask_options={"block_size": 8},
        )  # fmt: skip
        if model is None:
            model = get_peft_model(base, made, adapter_name=name)
        else:
            model.add_adapter(name, made)
    model.base_model.set_adapter(["first", "second"])
    layers = [m for m in model.modules() if hasattr(m, "shira_indices")]
    assert len(layers) == 3
    for layer in layers:
        unpacked(layer, "first")
        unpacked(layer, "second")
    ids = torch.randint(64, (12,))

    def step():
        model(ids).square().sum().backward()

    for _ in range(2):
        step()
    with Kernels():
        step()


def product_of(layer, x, names=("default",)):
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
    torch.testing.assert_close(before, product_of(layer, x))
    change(layer)
    after = layer(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, product_of(layer, x))


def test_hooks_and_other_adapters_count_from_the_next_call_on():
    layer, x = adapted_linear(("default", "second")), torch.randn(4, 64)
    torch.testing.assert_close(layer(x), product_of(layer, x, ("default", "second")))
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), product_of(layer, x, ("second",)))
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda *args: seen.append(args[-1]))
    with pytest.warns(UserWarning, match="hooks"):
        assert torch.equal(layer(x), seen[0])
    handle.remove()
    layer(x)
    assert len(seen) == 1
    layer.delete_adapter("second")
    torch.testing.assert_close(layer(x), product_of(layer, x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
