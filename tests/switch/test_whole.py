# SPDX-License-Identifier: Apache-2.0
"""Whole tensors of an adapter: in the module while it is active, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shira import Adapter, Switch
from shira.errors import AdapterError, SwitchError, TargetError, WrongBaseError
from tests.switch.models import DTYPES, Net, Tied, random_adapter


class Headed(Net):
    """With a head of two layers, a norm with buffers, and a convolution laid out otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(0, dtype)
        self.head = nn.Linear(6, 3, dtype=dtype)
        self.norm = nn.BatchNorm1d(6, dtype=dtype)
        self.norm.register_buffer("bytes", torch.randint(9, (130,), dtype=torch.uint8))
        self.norm.register_buffer("none", torch.empty(0, 3, dtype=dtype))
        self.out = nn.Conv2d(3, 4, 2, dtype=dtype).to(memory_format=torch.channels_last)
        self.eval()


def headed(seed: int, dtype: torch.dtype = torch.float32, **more: Tensor) -> Adapter:
    """An adapter with sparse entries, and another head, norm and convolution as a whole."""
    torch.manual_seed(seed)
    other = Headed(dtype)
    other.norm.train()(torch.randn(9, 6, dtype=dtype))
    sparse = random_adapter(Headed(dtype), seed, ("block.0.weight",))
    states = other.state_dict().items()
    whole = {n: t for n, t in states if n.startswith(("head.", "norm.", "out."))}
    return Adapter(sparse, None, {**whole, **more})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, tensors: dict[str, Tensor]) -> bool:
    held = module.state_dict()
    return all(torch.equal(held[n], tensor) for n, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_go_in_and_the_base_comes_back(dtype: torch.dtype) -> None:
    model = Headed(dtype)
    base, places = state(model), {n: t.data_ptr() for n, t in model.state_dict().items()}
    a, b = headed(1, dtype), headed(2, dtype)
    switch = Switch(model)
    switch.load("a", a)
    switch.load("b", b)
    assert same(model, base)
    for name, adapter in (("a", a), ("b", b), ("a", a)):
        switch.activate(name)
        assert same(model, dict(adapter.tensors))
        assert not same(model, base)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == places
    assert model.out.weight.is_contiguous(memory_format=torch.channels_last)
    switch.deactivate()
    assert same(model, base)
    with switch.using("b"):
        assert int(model.norm.num_batches_tracked) == 1
    assert same(model, base)


def test_a_byte_is_exchanged_alone() -> None:
    """Neighbours of a buffer of bytes in one memory stay as they are."""
    model = nn.Module()
    memory = torch.arange(64, dtype=torch.uint8)
    model.register_buffer("flags", memory[8:16])
    switch = Switch(model)
    switch.load("a", Adapter({}, None, {"flags": torch.zeros(8, dtype=torch.uint8)}))
    with switch.using("a"):
        assert (memory != torch.arange(64)).nonzero().flatten().tolist() == [*range(8, 16)]
    assert torch.equal(memory, torch.arange(64, dtype=torch.uint8))


def test_the_adapters_tensor_may_change_after_loading() -> None:
    model, tensor = Headed(), torch.ones(3)
    switch = Switch(model)
    switch.load("a", Adapter({}, None, {"head.bias": tensor}))
    tensor.zero_()
    switch.activate("a")
    assert torch.equal(model.head.bias, torch.ones(3))


def test_they_are_rounded_once_to_the_weights_dtype() -> None:
    model = Headed(torch.bfloat16)
    head = torch.randn(3, 6, dtype=torch.float64)
    switch = Switch(model)
    switch.load("a", Adapter({}, None, {"head.weight": head}))
    switch.activate("a")
    assert torch.equal(model.head.weight, head.bfloat16())
    with pytest.raises(AdapterError, match=r"'b', parameter 'head.bias': 3 of 3 .* not be finite"):
        switch.load("b", Adapter({}, None, {"head.bias": torch.full((3,), 3.4e38)}))


def test_a_module_that_is_cast_meanwhile() -> None:
    model = Headed()
    base = state(model)
    adapter = headed(1)
    switch = Switch(model)
    switch.load("a", adapter)
    switch.activate("a")
    model.bfloat16()
    floats = {n: t.bfloat16() for n, t in adapter.tensors.items() if t.is_floating_point()}
    assert same(model, floats)
    switch.deactivate()
    assert same(model, {n: t.to(model.state_dict()[n].dtype) for n, t in base.items()})
    switch.activate("a")
    assert same(model, floats)


@pytest.mark.parametrize("scales", [{"a": 0.5}, {"a": 0.0}, {"a": -1.0, "sparse": 1.0}])
def test_a_whole_tensor_has_no_scale(scales: dict[str, float]) -> None:
    model = Headed()
    base, adapter = state(model), headed(1)
    switch = Switch(model)
    switch.load("a", adapter)
    switch.load("sparse", adapter.restrict(list(adapter)))
    with pytest.raises(AdapterError, match=r"'a' has whole tensors \('head.weight', .* no scale"):
        switch.activate(scales)
    assert (switch.active, same(model, base)) == ({}, True)
    switch.activate({"a": 1.0, "sparse": 0.5})
    assert same(model, dict(adapter.tensors))
    switch.deactivate()
    assert same(model, base)


def test_two_for_one_weight_are_the_same_or_refused() -> None:
    model = Headed()
    base, a = state(model), headed(1)
    switch = Switch(model)
    switch.load("a", a)
    switch.load("twin", Adapter(random_adapter(model, 5), None, dict(a.tensors)))
    switch.load("b", headed(2))
    switch.load("on the head", random_adapter(model, 3, ("head.weight",)))
    switch.activate({"a": 1.0, "twin": 1.0})
    assert same(model, dict(a.tensors))
    for other in ("b", "on the head"):
        with pytest.raises(AdapterError, match=f"'a' and '{other}' cannot be active together"):
            switch.activate({"a": 1.0, other: 1.0})
        with pytest.raises(AdapterError, match=r"whole of 'head.weight'"):
            switch.activate({other: 1.0, "a": 1.0})
    switch.activate("on the head")
    switch.activate("a")
    switch.deactivate()
    assert same(model, base)


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ({"haed.weight": torch.ones(3, 6)}, AdapterError, "no parameter 'haed.weight'. Did you"),
        ({"head.weight": torch.ones(2, 6)}, WrongBaseError, "shape"),
        ({"norm.num_batches_tracked": torch.ones(())}, TargetError, "int64"),
        ({"head.bias": torch.ones(3, dtype=torch.int64)}, WrongBaseError, "torch.int64"),
        ({"norm.num_batches_tracked": torch.ones((), dtype=torch.int32)}, TargetError, "int64"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    tensors: dict[str, Tensor], error: type[Exception], match: str
) -> None:
    model = Headed()
    base = state(model)
    switch = Switch(model)
    with pytest.raises(error, match=match):
        switch.load("a", Adapter(random_adapter(model, 1), None, tensors))
    assert (switch.loaded, same(model, base)) == ((), True)


def test_buffers_that_are_tied_and_shared_with_other_processes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].running_mean = model[0].running_mean.share_memory_()
    shared = model[0].running_mean[:]
    whole = {f"{at}.running_mean": torch.ones(4) for at in range(2)}
    switch = Switch(model)
    with pytest.warns(UserWarning, match="1 weights, '0.running_mean' first"):
        switch.load("a", Adapter({}, None, whole))
    with switch.using("a"):
        assert same(model, whole)
        assert not shared.any()
    assert not model[1].running_mean.any()


def test_a_delta_is_not_for_a_buffer() -> None:
    delta = random_adapter(Headed(), 1, ("vector",))["vector"]
    with pytest.raises(AdapterError, match=r"no parameter 'norm.running_mean'"):
        Switch(Headed()).load("a", Adapter({"norm.running_mean": delta}))


def test_somebody_else_has_written_there() -> None:
    model = Headed()
    switch = Switch(model)
    switch.load("a", headed(1))
    switch.activate("a")
    model.norm.train()(torch.randn(4, 6))
    held = state(model)
    with pytest.raises(SwitchError, match=r"of 'norm.running_mean' does not hold what"):
        switch.deactivate()
    assert same(model, held)
    switch.deactivate(force=True)
    assert same(model, state(Headed().train(False))) or int(model.norm.num_batches_tracked) == 0


def test_tied_weights() -> None:
    tensor = torch.randn(7, 6)
    model = Tied()
    base = state(model)
    switch = Switch(model)
    with pytest.raises(TargetError, match=r"'head.weight' shares its memory with 'emb.weight'"):
        switch.load("head", Adapter({}, None, {"head.weight": tensor}))
    both = {"head.weight": tensor, "emb.weight": tensor.clone()}
    switch.load("both", Adapter({}, None, both))
    switch.activate("both")
    assert same(model, both)
    switch.deactivate()
    assert same(model, base)
    unlike = {**both, "emb.weight": tensor + 1}
    with pytest.raises(AdapterError, match="two changes for one weight, which is tied"):
        switch.load("unlike", Adapter({}, None, unlike), allow_tied=True)
