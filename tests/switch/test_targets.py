# SPDX-License-Identifier: Apache-2.0
"""Weights of every kind: layouts, tied, frozen, made in inference mode, mapped, moved, refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shira import Adapter, SparseDelta, Support, Switch
from shira.errors import AdapterError, SwitchError, TargetError

from .models import NAMES, Tied, equal, expected, net, pointers, random_adapter, snapshot


def check(module: nn.Module, names=NAMES) -> Switch:
    """Two adapters in every order on a module's weights."""
    base = {name: module.get_parameter(name).detach().clone() for name in names}
    switch, adapters, where = Switch(module), {}, pointers(module)
    for seed, name in enumerate("ab"):
        adapters[name] = random_adapter(module, seed, names)
        switch.load(name, adapters[name])
    for active in ({"a": 1.0}, {"b": 1.0}, {"b": 0.5, "a": 1.0}, {}, {"b": -1.0}, {}):
        switch.activate(active)
        for name, want in expected(base, adapters, active).items():
            assert torch.equal(module.get_parameter(name), want)
    assert pointers(module) == where
    return switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_contiguous_weights(dtype):
    module = net(dtype)
    module.block[0].weight = nn.Parameter(torch.randn(6, 10).to(dtype).t())
    module.conv.to(memory_format=torch.channels_last)
    wide = torch.randn(14, 12).to(dtype)
    module.emb.weight = nn.Parameter(wide[::2, 1::2])  # every other row and column
    outside = wide.clone()
    module.vector = nn.Parameter(torch.randn(30).to(dtype)[2:29:3])
    for name in NAMES[:2]:
        assert not module.get_parameter(name).is_contiguous()
    check(module)
    assert torch.equal(wide, outside)


def test_where_a_changed_entry_of_a_transposed_weight_is():
    module = nn.Linear(6, 10)
    module.weight = nn.Parameter(torch.randn(6, 10).t())
    switch = Switch(module)
    support = Support((10, 6), torch.tensor([4 * 6 + 2, 9 * 6]))
    switch.load("a", Adapter({"weight": SparseDelta(support, torch.ones(2))}))
    module.weight.data[4, 2] = 9.0
    with pytest.raises(SwitchError, match=r"entry \(4, 2\) of 'weight'"):
        switch.activate("a")


def test_frozen_weights_and_weights_made_in_inference_mode():
    check(net().requires_grad_(False))
    with torch.inference_mode():
        module = net()
    assert module.vector.is_inference()
    check(module)
    switch = check(net())
    with torch.inference_mode():  # and called in it
        switch.activate("a")
    switch.deactivate()
    with torch.inference_mode():
        switch = check(net())
    switch.activate("a")


def test_a_weight_that_requires_grad_can_be_trained_afterwards():
    module = net()
    switch = check(module)
    switch.activate("a")
    optimizer = torch.optim.SGD([module.vector], lr=0.1)
    module.vector.square().sum().backward()
    optimizer.step()
    with pytest.raises(SwitchError, match="written to the weight"):
        switch.deactivate()


class TiedByView(Tied):
    """Two parameters, one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.emb.weight.data)


@pytest.mark.parametrize("kind", [Tied, TiedByView])
def test_tied_weights(kind):
    module = kind()
    before = module.emb.weight.detach().clone()
    one = random_adapter(module, 0, ("emb.weight",))
    two = Adapter({"head.weight": random_adapter(module, 1, ("emb.weight",))["emb.weight"]})
    switch = Switch(module)
    with pytest.raises(TargetError, match=r"'emb\.weight' shares its .* 'head\.weight' .tied"):
        switch.load("one", one)
    with pytest.raises(TargetError, match=r"'head.weight' shares its memory with 'emb.weight'"):
        switch.load("two", two)
    with pytest.raises(AdapterError, match="two changes for one weight, which is tied"):
        switch.load("both", Adapter({**one, **two}), allow_tied=True)
    assert switch.loaded == ()
    switch.load("one", one, allow_tied=True)
    switch.load("two", two, allow_tied=True)
    adapters = {"one": one, "two": Adapter({"emb.weight": two["head.weight"]})}
    for active in ({"one": 1.0}, {"two": 1.0}, {"two": 0.5, "one": 1.0}, {}):
        switch.activate(active)
        want = expected({"emb.weight": before}, adapters, active)["emb.weight"]
        assert torch.equal(module.emb.weight, want)
        assert torch.equal(module.head.weight, want)


def test_weights_that_overlap_in_part():
    module, memory = nn.Module(), torch.randn(60)
    module.left = nn.Parameter(memory[:40].view(10, 4))
    module.right = nn.Parameter(memory[30:].view(10, 3))
    module.apart = nn.Parameter(torch.randn(20)[:10])
    module.register_buffer("buffer", memory[:3])
    switch = Switch(module)
    with pytest.raises(TargetError, match="shares its memory with 'buffer', 'right'"):
        switch.load("a", random_adapter(module, 0, ("left",)))
    with pytest.raises(TargetError, match="a part of its memory with 'buffer', 'right'"):
        switch.load("a", random_adapter(module, 0, ("left",)), allow_tied=True)
    switch.load("a", random_adapter(module, 0, ("apart",)))


def test_neighbours_in_one_storage_are_not_tied():
    module, memory = nn.Module(), torch.randn(60)
    module.left = nn.Parameter(memory[:40].view(10, 4))
    module.right = nn.Parameter(memory[40:].view(10, 2))
    check(module, ("left", "right"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.to("meta"), "on the meta device and has no values"),
        (lambda m: m.__setattr__("vector", nn.Parameter(torch.zeros(1).expand(9))), "share memory"),
        (
            lambda m: m.__setattr__(
                "vector", nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
            ),
            "no plain floating point weight.*uint8",
        ),
        (
            lambda m: m.__setattr__("vector", nn.Parameter(torch.zeros(9).to(torch.float8_e4m3fn))),
            "no plain floating point weight.*float8",
        ),
        (
            lambda m: m.__setattr__("vector", nn.Parameter(torch.ones(9).to_sparse())),
            "no plain floating point weight.*sparse",
        ),
        (
            lambda m: m.__setattr__("vector", nn.parameter.UninitializedParameter()),
            "no plain floating point weight",
        ),
    ],
    ids=["meta", "expanded", "uint8", "float8", "sparse", "lazy"],
)
def test_weights_that_cannot_be_written_to_are_refused(spoil, message):
    whole = net()
    adapter = random_adapter(whole, 0)
    spoil(whole)
    switch = Switch(whole)
    with pytest.raises(TargetError, match=message):
        switch.load("a", adapter)
    assert switch.loaded == ()


def test_weights_mapped_from_a_file_are_not_written_through(tmp_path):
    memory = tmp_path / "weights"
    before = torch.randn(40).numpy().tobytes()
    memory.write_bytes(before)
    module = nn.Module()
    module.weight = nn.Parameter(torch.from_file(str(memory), shared=True, size=40))
    module.same = module.weight
    switch = Switch(module)
    with pytest.warns(UserWarning, match="1 weights, 'weight' first, were mapped from a file"):
        switch.load("a", random_adapter(module, 0, ("weight",)), allow_tied=True)
    where = module.weight.data_ptr()
    switch.activate("a")
    assert module.weight.data_ptr() == module.same.data_ptr() == where
    assert memory.read_bytes() == before
    switch.deactivate()
    assert module.weight.detach().numpy().tobytes() == before


def test_weights_shared_with_other_processes_are_not_written_to():
    module = net()
    module.share_memory()
    shared = module.vector.data
    before = shared.clone()
    switch = Switch(module)
    with pytest.warns(UserWarning, match="4 weights"):
        switch.load("a", random_adapter(module, 0))
    switch.activate("a")
    assert torch.equal(shared, before)
    assert not torch.equal(module.vector, before)


@pytest.mark.parametrize("when", ["before loading", "after loading"])
def test_a_part_of_a_shared_matrix_keeps_its_layout_in_memory_of_its_own(when):
    shared = torch.randn(10, 12)
    module = nn.Module()
    module.weight = nn.Parameter(shared[:, ::2])
    base, switch, adapter = snapshot(module), Switch(module), random_adapter(module, 0, ["weight"])
    before = shared.clone()
    if when == "before loading":
        shared.share_memory_()
        with pytest.warns(UserWarning, match="1 weights, 'weight' first"):
            switch.load("a", adapter)
    else:
        switch.load("a", adapter)
        module.weight.data = shared.share_memory_()[:, ::2]
        with pytest.warns(UserWarning, match="1 weights, 'weight' first"):
            switch.activate("a")
    switch.activate("a")
    assert equal(module, expected(base, {"a": adapter}, {"a": 1.0}))
    assert torch.equal(shared, before)
    switch.deactivate()
    assert equal(module, base)


@pytest.mark.parametrize("active", [{}, {"a": 1.0, "b": 0.5}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_that_is_cast(active, dtype):
    module = net()
    base, switch, adapters = snapshot(module), Switch(module), {}
    for seed, name in enumerate("ab"):
        adapters[name] = random_adapter(module, seed)
        switch.load(name, adapters[name])
    switch.activate(active)
    want = {n: w.to(dtype) for n, w in expected(base, adapters, active).items()}
    module.to(dtype)
    assert equal(module, want)
    base = {name: weight.to(dtype) for name, weight in base.items()}
    for now in ({"b": 1.0}, {"a": 1.0, "b": 0.5}, {"a": 1.0}, {}):
        switch.activate(now)
        assert equal(module, expected(base, adapters, now))


@pytest.mark.parametrize("active", [{}, {"a": 1.0}])
def test_unloading_another_adapter_after_a_cast(active):
    module = net()
    base, switch = snapshot(module), Switch(module)
    adapters = {name: random_adapter(module, seed) for seed, name in enumerate("ab")}
    for name, adapter in adapters.items():
        switch.load(name, adapter)
    switch.activate(active)
    module.to(torch.bfloat16)
    base = {name: weight.to(torch.bfloat16) for name, weight in base.items()}
    switch.unload("b")
    for now in ({}, {"a": 1.0}, {}):
        switch.activate(now)
        assert equal(module, expected(base, adapters, now))


def test_a_module_that_is_laid_out_anew():
    module = net()
    base, switch = snapshot(module), Switch(module)
    adapters = {"a": random_adapter(module, 0)}
    switch.load("a", adapters["a"])
    module.conv.to(memory_format=torch.channels_last)
    switch.activate("a")
    assert equal(module, expected(base, adapters, {"a": 1.0}))
    module.conv.weight.data = module.conv.weight.data.contiguous()
    with pytest.raises(SwitchError, match=r"'conv\.weight' was laid out anew"):
        switch.deactivate()
    assert switch.active == {"a": 1.0}
    module.conv.to(memory_format=torch.channels_last)
    switch.deactivate()
    assert equal(module, base)
    module.vector = nn.Parameter(torch.randn(8))
    with pytest.raises(SwitchError, match=r"'vector' has shape \(8,\) now"):
        switch.activate("a")
    module.to("meta")
    with pytest.raises(SwitchError, match="no values to switch"):
        switch.activate("a")


def test_a_replaced_module_is_noticed_when_loading():
    module = net()
    switch = check(module)
    module.block[0] = nn.Linear(6, 10)
    with pytest.raises(AdapterError, match=r"in another module.*make a new Switch"):
        switch.load("c", random_adapter(module, 3))


@pytest.mark.gpu
def test_on_a_gpu():
    module = net(torch.bfloat16)
    base, switch = snapshot(module), Switch(module)
    adapters = {name: random_adapter(module, seed) for seed, name in enumerate("ab")}
    for name, adapter in adapters.items():
        switch.load(name, adapter)
    switch.activate("a")
    module.to("cuda")
    for now in ({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 0.5}, {}):
        switch.activate(now)
        want = expected(base, adapters, now)
        assert all(torch.equal(p.cpu(), want[name]) for name, p in module.named_parameters())
