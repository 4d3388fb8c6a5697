# SPDX-License-Identifier: Apache-2.0
"""What Switch does when all goes well."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import shira
from shira import Adapter, SparseDelta, Support, Switch
from shira.base import fingerprint
from shira.ops.patch import Exchange

from .models import DTYPES, NAMES, equal, expected, net, pointers, random_adapter, snapshot


@pytest.fixture
def scene():
    return Scene(torch.float32)


class Scene:
    """A module, what it was, and three adapters that overlap."""

    def __init__(self, dtype: torch.dtype, count: int = 3) -> None:
        self.module = net(dtype)
        self.base = snapshot(self.module)
        self.switch = Switch(self.module)
        self.adapters = {}
        for seed, name in enumerate("abcdefgh"[:count]):
            self.adapters[name] = random_adapter(self.module, seed)
            self.switch.load(name, self.adapters[name])

    def holds(self, active) -> bool:
        return equal(self.module, expected(self.base, self.adapters, active))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "active",
    [
        {"a": 1.0},
        {"b": 0.5},
        {"a": -2.0},
        {"a": 0.0},
        {"a": 1.0, "b": 1.0},
        {"c": 0.3, "a": 1.5, "b": -1.0},
    ],
)
def test_activate_holds_the_rounded_sum_and_deactivate_the_base(dtype, active):
    scene = Scene(dtype)
    where = pointers(scene.module)
    scene.switch.activate(active)
    assert scene.switch.active == active
    assert scene.holds(active)
    scene.switch.deactivate()
    assert scene.switch.active == {}
    assert equal(scene.module, scene.base)
    assert pointers(scene.module) == where


def test_a_name_alone_means_scale_one(scene):
    scene.switch.activate("a")
    assert scene.switch.active == {"a": 1.0}
    assert scene.holds({"a": 1.0})
    for name, delta in scene.adapters["a"].items():
        flat = delta.support.indices.long()
        want = delta.replacement(scene.base[name].view(-1)[flat])
        assert torch.equal(scene.module.get_parameter(name).view(-1)[flat], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype):
    """Eight overlapping adapters, 1,000 switches with scales and combinations, and back."""
    scene = Scene(dtype, count=8)
    where = pointers(scene.module)
    random = torch.Generator().manual_seed(3)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=random))

    for turn in range(1000):
        count = 1 + draw(3) * draw(2)
        chosen = torch.randperm(8, generator=random)[:count].tolist()
        scales = (1.0, 1.0, 0.5, -0.7, 2.0)
        active = {"abcdefgh"[i]: scales[draw(5)] for i in chosen}
        scene.switch.activate(active)
        if turn % 50 == 0:
            assert scene.holds(active)
        if draw(20) == 0:
            scene.switch.deactivate()
            assert equal(scene.module, scene.base)
    scene.switch.deactivate()
    assert equal(scene.module, scene.base)
    assert pointers(scene.module) == where


def test_the_bits_do_not_depend_on_the_order_of_a_combination(scene):
    scene.switch.activate({"c": 0.3, "a": 0.7, "b": 1.1})
    one = snapshot(scene.module)
    scene.switch.deactivate()
    scene.switch.activate({"b": 1.1, "c": 0.3, "a": 0.7})
    assert equal(scene.module, one)


def test_an_empty_combination_is_the_base(scene):
    scene.switch.activate("a")
    scene.switch.activate({})
    assert scene.switch.active == {}
    assert equal(scene.module, scene.base)


def test_going_from_one_to_another_writes_their_union_and_nothing_else(scene):
    scene.switch.activate("a")
    strangers = {}
    for name, weight in scene.module.named_parameters():
        covered = torch.zeros(weight.shape, dtype=torch.bool)
        for adapter in ("a", "b"):
            if name in scene.adapters[adapter]:
                covered |= scene.adapters[adapter][name].support.mask()
        with torch.no_grad():
            weight[~covered] = float("nan")  # somebody else's from now on
        strangers[name] = ~covered
    scene.switch.activate("b")
    want = expected(scene.base, scene.adapters, {"b": 1.0})
    for name, weight in scene.module.named_parameters():
        assert weight[strangers[name]].isnan().all()
        kept = ~strangers[name]
        assert torch.equal(weight[kept], want[name][kept])


def test_using_returns_to_what_was_active(scene):
    scene.switch.activate("a")
    with scene.switch.using({"b": 0.5}) as switch:
        assert switch is scene.switch
        assert scene.holds({"b": 0.5})
        with scene.switch.using({}):
            assert equal(scene.module, scene.base)
        assert scene.holds({"b": 0.5})
    assert scene.holds({"a": 1.0})
    with pytest.raises(ZeroDivisionError), scene.switch.using("c"):
        1 / 0  # noqa: B018
    assert scene.holds({"a": 1.0})


def test_loading_while_another_is_active_sees_the_base(scene):
    scene.switch.activate({"a": 1.0, "b": 1.0})
    scene.adapters["late"] = random_adapter(scene.module, 77)
    scene.switch.load("late", scene.adapters["late"])
    assert scene.holds({"a": 1.0, "b": 1.0})
    scene.switch.activate("late")
    assert scene.holds({"late": 1.0})
    scene.switch.deactivate()
    assert equal(scene.module, scene.base)


def test_unload_forgets(scene):
    scene.switch.activate({"a": 0.5, "b": 0.5})
    scene.switch.activate("c")
    scene.switch.unload("a")
    assert scene.switch.loaded == ("b", "c")
    assert "a" not in scene.switch
    assert "b" in scene.switch
    scene.adapters["a"] = random_adapter(scene.module, 5)
    scene.switch.load("a", scene.adapters["a"])
    scene.switch.activate({"a": 0.5, "b": 0.5})
    assert scene.holds({"a": 0.5, "b": 0.5})
    assert repr(scene.switch) == "Switch(loaded=['b', 'c', 'a'], active={'a': 0.5, 'b': 0.5})"


def test_combinations_are_kept_within_a_bound(scene):
    for scale in range(2, 30):
        scene.switch.activate({"a": float(scale)})
    assert len(scene.switch._combinations) == 8
    for none in (0, -1):
        none_kept = Switch(net(), kept_combinations=none)
        none_kept.load("a", scene.adapters["a"])
        none_kept.activate({"a": 0.5})
        none_kept.deactivate()
        assert not none_kept._combinations


def test_the_cost_of_switching_does_not_depend_on_how_many_are_loaded(scene, monkeypatch):
    written = []
    real = Exchange.put_in
    monkeypatch.setattr(
        Exchange,
        "put_in",
        lambda made: (written.append((made.before, made.after)), real(made)),
    )

    def cost() -> int:
        written.clear()
        scene.switch.activate("b")
        scene.switch.activate("a")
        return sum(patch.nnz for pair in written for patch in pair if patch is not None)

    scene.switch.activate("a")
    few = cost()
    for seed in range(50, 70):
        scene.switch.load(f"more {seed}", random_adapter(scene.module, seed))
    assert cost() == few == 2 * (scene.adapters["a"].nnz + scene.adapters["b"].nnz)


@pytest.mark.parametrize("format", ["peft", "compact"])
def test_adapters_are_loaded_from_files(scene, tmp_path, format):
    scene.adapters["a"] = random_adapter(scene.module, 0, NAMES[:3])  # PEFT's format has no more
    scene.adapters["a"].save(tmp_path / "a", format=format)
    for where in (tmp_path / "a", os.fspath(tmp_path / "a")):
        switch = Switch(net())
        switch.load("from file", where)
        switch.activate("from file")
        assert equal(switch.module, expected(scene.base, scene.adapters, {"a": 1.0}))


def test_an_adapter_knows_its_base_by_its_fingerprint(scene, tmp_path):
    name = "block.0.weight"
    delta = scene.adapters["a"][name]
    values = scene.base[name].view(-1)[delta.support.indices]
    metadata = {"base_fingerprint": {name: fingerprint(values)}}
    adapter = Adapter({name: delta}, metadata)
    scene.switch.activate("b")  # its entries are not what is hashed
    scene.switch.load("own", adapter)
    other = net()
    with torch.no_grad():
        other.block[0].weight[tuple(delta.support.coordinates()[:, 3])] += 1
    switch = Switch(other)
    with pytest.raises(shira.errors.WrongBaseError, match=r"wrong base.*block\.0\.weight.*check"):
        switch.load("foreign", adapter)
    assert "foreign" not in switch
    switch.load("foreign", adapter, check_base=False)
    Switch(net(torch.bfloat16)).load("another dtype says nothing", adapter)
    adapter.save(tmp_path / "a", format="compact")
    with pytest.raises(shira.errors.WrongBaseError, match="wrong base"):
        switch.load("from file", tmp_path / "a")
    zero = Adapter({name: SparseDelta(delta.support, delta.values * 0)}, metadata)
    switch.load("untrained", zero)


def test_empty_and_single_entry_supports():
    module = net()
    base = snapshot(module)
    none = SparseDelta(Support((10, 6), torch.tensor([], dtype=torch.int32)), torch.tensor([]))
    one = SparseDelta(Support((7, 6), torch.tensor([41])), torch.tensor([2.0]))
    adapters = {"a": Adapter({"block.0.weight": none, "emb.weight": one}), "b": Adapter({})}
    switch = Switch(module)
    for name, adapter in adapters.items():
        switch.load(name, adapter)
    switch.activate("a")
    assert equal(module, expected(base, adapters, {"a": 1.0}))
    switch.activate({"a": 1.0, "b": 2.0})
    assert equal(module, expected(base, adapters, {"a": 1.0}))
    switch.activate("b")
    assert equal(module, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_deltas_of_any_floating_dtype(dtype):
    module = net(torch.bfloat16)
    base, switch, adapters = snapshot(module), Switch(module), {}
    for seed, name in enumerate("ab"):
        adapters[name] = random_adapter(module, seed, dtype=dtype)
        switch.load(name, adapters[name])
    for active in ({"a": 0.3}, {"a": 0.3, "b": 0.7}):
        switch.activate(active)
        assert equal(module, expected(base, adapters, active))


def test_threads_take_turns(scene):
    """Each thread sees its own adapter for as long as it uses it."""
    want = {name: expected(scene.base, scene.adapters, {name: 1.0}) for name in scene.adapters}
    wrong = []

    def work(name: str) -> None:
        for _ in range(40):
            with scene.switch.using(name):
                if not equal(scene.module, want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in scene.adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert equal(scene.module, scene.base)


def test_a_graph_from_before_is_refused_while_an_adapter_is_in(scene):
    layer = scene.module.block[0]
    x = torch.randn(3, 6, requires_grad=True)
    loss = layer(x).square().sum()
    want = torch.autograd.grad(loss, x, retain_graph=True)[0]
    scene.switch.activate("a")
    scene.switch.activate("b")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, retain_graph=True)
    scene.switch.deactivate()
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)


def test_a_module_that_is_compiled_or_wrapped(scene):
    wrapped = torch.nn.DataParallel(torch.compile(scene.module, backend="eager"))
    switch = Switch(wrapped)
    switch.load("x", scene.adapters["a"])
    switch.activate("x")
    assert scene.holds({"a": 1.0})
