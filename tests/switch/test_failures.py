# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong, the weights are as before and the Switch goes on working."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from torch import nn

import shira
from shira import Adapter, SparseDelta, Support, Switch
from shira.errors import (
    AdapterError,
    FileFormatError,
    SwitchError,
    TargetError,
    UnknownAdapterError,
    WrongBaseError,
)
from shira.ops import native
from shira.ops.patch import Exchange
from tests.interrupts import at_every_point, in_child

from .models import equal, expected, net, random_adapter, snapshot


class Scene:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.module = net(dtype)
        self.base = snapshot(self.module)
        self.adapters = {name: random_adapter(self.module, i) for i, name in enumerate("abc")}
        self.switch = Switch(self.module)
        for name, adapter in self.adapters.items():
            self.switch.load(name, adapter)

    def holds(self, active) -> bool:
        return equal(self.module, expected(self.base, self.adapters, active))

    def still_works(self) -> bool:
        for active in ({"a": 1.0, "b": 2.0}, {"c": 1.0}, {"a": 1.0}):
            self.switch.activate(active)
            if not self.holds(active):
                return False
        self.switch.deactivate()
        return equal(self.module, self.base)


@pytest.fixture
def scene():
    return Scene()


def one_delta(name="block.0.weight", shape=(10, 6), index=3, value=1.0):
    return Adapter(
        {name: SparseDelta(Support(shape, torch.tensor([index])), torch.tensor([value]))}
    )


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (one_delta("block.0.weigth"), AdapterError, "no parameter.*Did you mean 'block.0.weight'"),
        (one_delta(shape=(6, 10)), WrongBaseError, r"\(6, 10\), but the model's has \(10, 6\)"),
        (one_delta(value=float("inf")), AdapterError, "1 of 1 entries would not be finite.*inf"),
        (one_delta(value=float("nan")), AdapterError, "parameter 'block.0.weight'.*not be finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(scene, adapter, error, message):
    scene.switch.activate("b")
    whole = random_adapter(scene.module, 9)
    with pytest.raises(error, match=message) as caught:
        scene.switch.load("bad", Adapter({**whole, **adapter}))
    assert "'bad'" in str(caught.value)
    assert scene.switch.loaded == ("a", "b", "c")
    assert scene.holds({"b": 1.0})
    assert scene.still_works()


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ("aa", UnknownAdapterError, "no adapter 'aa' is loaded; there is 'a', 'b', 'c'"),
        ({"a": 1.0, "d": 1.0}, UnknownAdapterError, "no adapter 'd'"),
        ({"a": float("nan")}, AdapterError, "scale of 'a' is a finite number, not nan"),
        ({"a": "1"}, AdapterError, "scale of 'a' is a number, not '1'"),
        ({"a": True}, AdapterError, "scale of 'a' is a number, not True"),
        (["a"], AdapterError, re.escape("name an adapter, or {name: scale}, not ['a']")),
        ({"a": 1e39}, AdapterError, "parameter 'emb.weight'.*not be finite in float32.*inf"),
        ({"a": 1e39, "b": 1}, AdapterError, "parameter 'emb.weight'.*not be finite in float32"),
    ],
)
def test_what_cannot_be_activated(scene, which, error, message):
    scene.switch.activate("c")
    with pytest.raises(error, match=message):
        scene.switch.activate(which)
    with pytest.raises(error, match=message), scene.switch.using(which):
        raise AssertionError("not reached")
    assert scene.switch.active == {"c": 1.0}
    assert scene.holds({"c": 1.0})
    assert scene.still_works()


def test_names_and_modules(scene, tmp_path):
    with pytest.raises(AdapterError, match="'a' is loaded already"):
        scene.switch.load("a", scene.adapters["b"])
    with pytest.raises(AdapterError, match="not empty"):
        scene.switch.load("", scene.adapters["b"])
    scene.switch.load("poems", scene.adapters["a"])
    with pytest.raises(UnknownAdapterError, match=r"no adapter 'poem'.*Did you mean 'poems'"):
        scene.switch.unload("poem")
    with pytest.raises(UnknownAdapterError, match="there is none"):
        Switch(scene.module).activate("x")
    with pytest.raises(TargetError, match=r"takes an nn\.Module, not dict"):
        Switch({})
    with pytest.raises(FileNotFoundError):
        scene.switch.load("d", tmp_path / "nothing")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no file of ours")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SHIRA"}')
    with pytest.raises(FileFormatError):
        scene.switch.load("d", tmp_path)
    assert scene.still_works()


def test_what_is_in_use_is_not_unloaded(scene):
    scene.switch.activate({"a": 1.0, "b": 0.5})
    with pytest.raises(AdapterError, match="'b' is in use"):
        scene.switch.unload("b")
    with scene.switch.using("c"):
        with pytest.raises(AdapterError, match="'a' is in use"):
            scene.switch.unload("a")
        with pytest.raises(SwitchError, match="using"):
            scene.switch.rebase()
    assert scene.holds({"a": 1.0, "b": 0.5})
    assert scene.still_works()


class Boom(BaseException):
    """Not an Exception: an interrupt is none either."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        ({}, {"b": 1.0}),
        ({"a": 1.0}, {}),
        ({"a": 1.0}, {"b": 1.0}),
        ({"a": 0.5, "c": 1.0}, {"b": 1.0, "c": -1.0}),
    ],
    ids=["base-b", "a-base", "a-b", "ac-bc"],
)
def test_a_failure_in_any_layer_leaves_everything_as_it_was(
    scene, monkeypatch, when, layer, start, end
):
    scene.switch.activate(start)
    real, calls = Exchange.put_in, []

    def faulty(exchange):
        calls.append(exchange)
        if len(calls) == layer + 1 and when == "before":
            raise Boom
        real(exchange)
        if len(calls) == layer + 1:
            raise Boom

    with monkeypatch.context() as patched:
        patched.setattr(Exchange, "put_in", faulty)
        with pytest.raises(Boom):
            scene.switch.activate(end)
    assert scene.switch.active == start
    assert scene.holds(start)
    assert scene.still_works()


def test_an_interrupt_after_the_last_layer_is_undone_too(scene, monkeypatch):
    scene.switch.activate("a")

    def faulty(*args):
        raise Boom

    with monkeypatch.context() as patched:
        patched.setattr(shira.switch.weights, "count_write", faulty)
        with pytest.raises(Boom):
            scene.switch.activate("b")
    assert scene.switch.active == {"a": 1.0}
    assert scene.holds({"a": 1.0})
    assert scene.still_works()


@pytest.mark.parametrize(
    ("way", "dtype", "every"),
    [
        ("compiled", torch.float32, 1),
        ("compiled", torch.bfloat16, 7),
        ("compiled", torch.float16, 8),
        ("torch", torch.float32, 3),
    ],
)
def test_an_interrupt_anywhere_leaves_what_was_active_or_what_was_asked_for(
    monkeypatch, way, dtype, every
):
    if way == "torch":
        monkeypatch.setattr(native, "load", lambda: native.Loaded(None, "for a test"))
    scene = Scene(dtype)
    for start, end in [({}, {"a": 0.5, "c": 1.0}), ({"a": 1.0}, {"b": 1.0}), ({"b": 1.0}, {})]:
        scene.switch.activate(start)

        def switch(end=end):
            scene.switch.activate(end)

        def check(start=start, end=end):
            torch.set_grad_enabled(True)  # torch's own contexts do not survive every interrupt
            assert scene.switch._weights.unfinished is False
            assert scene.switch.active in (start, end)
            assert scene.holds(scene.switch.active)
            scene.switch.activate(start)
            assert scene.holds(start)

        assert at_every_point(switch, check, every) > 50
    assert scene.still_works()


def test_the_body_of_using_that_is_interrupted_returns_to_what_was_active():
    scene = Scene()
    scene.switch.activate("a")

    def body():
        with scene.switch.using("b"):
            assert scene.holds({"b": 1.0})

    def check():
        torch.set_grad_enabled(True)
        assert scene.switch.active == {"a": 1.0}
        assert scene.holds({"a": 1.0})
        assert not scene.switch._to_return_to

    assert at_every_point(body, check, every=2) > 100


def test_a_name_whose_unloading_was_interrupted_is_free_of_the_old_adapters_combinations(scene):
    old, new = scene.adapters["a"], random_adapter(scene.module, 7)

    def check():
        for adapter in (new, old):
            if "a" in scene.switch.loaded:
                scene.switch.unload("a")
            scene.switch.load("a", adapter)
            scene.adapters["a"] = adapter
            scene.switch.activate({"a": 0.5})
            assert scene.holds({"a": 0.5})
            scene.switch.deactivate()

    check()
    assert at_every_point(lambda: scene.switch.unload("a"), check) > 3


def test_a_switch_whose_way_back_is_interrupted_too_is_undone_by_the_next_call(scene, monkeypatch):
    scene.switch.activate("a")

    def interrupted(*_):
        raise Boom

    with monkeypatch.context() as patched:
        patched.setattr(Exchange, "roll_back", interrupted)
        patched.setattr(scene.switch._weights, "_count_writes", interrupted)
        with pytest.raises(Boom):
            scene.switch.activate("b")
    assert not scene.holds({"a": 1.0})
    scene.switch.activate("a")
    assert scene.holds({"a": 1.0})
    assert scene.still_works()


def test_a_fork_frees_the_lock_of_a_thread_that_is_not_there(scene):
    inside, leave = threading.Event(), threading.Event()

    def work():
        with scene.switch.using("a"):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(20)
    try:
        assert in_child(lambda: (scene.switch.deactivate(), equal(scene.module, scene.base))[1])
    finally:
        leave.set()
        thread.join()
    with scene.switch.lock:  # of the thread that forks, it stays its own
        assert in_child(lambda: scene.switch.lock._is_owned())
    assert scene.still_works()


def entry_of(scene, adapter, *, but_not=()):
    """A weight and the flat index of an entry that one adapter has and others have not."""
    for name in reversed(list(scene.adapters[adapter])):
        mine = set(scene.adapters[adapter][name].support.indices.tolist())
        for other in but_not:
            mine -= set(scene.adapters[other][name].support.indices.tolist())
        if mine:
            return name, max(mine)
    raise AssertionError


@pytest.mark.parametrize("to", [{}, {"b": 1.0}])
def test_a_weight_that_was_changed_while_active_is_not_overwritten(scene, to):
    scene.switch.activate("a")
    name, flat = entry_of(scene, "a")
    weight = scene.module.get_parameter(name)
    weight.data.view(-1)[flat] = 7.0
    before = snapshot(scene.module)
    with pytest.raises(
        SwitchError, match=re.escape(f"of '{name}' does not hold what {{'a': 1.0}}")
    ):
        scene.switch.activate(to)
    assert equal(scene.module, before)
    assert scene.switch.active == {"a": 1.0}
    with pytest.raises(SwitchError, match=r"deactivate\(force=True\)"):
        scene.switch.deactivate()
    scene.switch.deactivate(force=True)
    assert equal(scene.module, scene.base)
    assert scene.still_works()


def test_a_base_that_was_changed_between_is_noticed(scene):
    scene.switch.activate("b")
    name, flat = entry_of(scene, "a", but_not=["b"])
    scene.module.get_parameter(name).data.view(-1)[flat] = 7.0
    before = snapshot(scene.module)
    where = tuple(i.item() for i in torch.unravel_index(torch.tensor(flat), scene.base[name].shape))
    with pytest.raises(SwitchError, match=re.escape(f"entry {where} of '{name}'") + ".*base did"):
        scene.switch.activate("a")
    assert equal(scene.module, before)
    scene.switch.deactivate()  # that entry is none of b's
    scene.base[name].view(-1)[flat] = 7.0
    assert equal(scene.module, scene.base)
    scene.switch.rebase()
    assert scene.still_works()


def test_rebase_takes_a_state_dict_loaded_while_active_for_the_base(scene):
    scene.switch.activate({"a": 1.0, "b": 1.0})
    fresh = type(scene.module)(seed=5)
    scene.module.load_state_dict(fresh.state_dict())
    with pytest.raises(SwitchError):
        scene.switch.deactivate()
    scene.switch.rebase()
    assert scene.switch.active == {}
    scene.base = snapshot(fresh)
    assert equal(scene.module, scene.base)
    assert scene.still_works()


def test_negative_zero_and_nan_are_told_from_zero(scene):
    """Bits are compared, not values: NaN equals itself, and -0.0 is not 0.0."""
    module = nn.Linear(2, 2, bias=False)
    module.weight.data = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
    support = Support((2, 2), torch.tensor([0, 1]))
    switch = Switch(module)
    switch.load("a", Adapter({"weight": SparseDelta(support, torch.tensor([1.0, 1.0]))}))
    switch.activate("a")
    switch.deactivate()
    assert module.weight[0, 1].isnan()
    module.weight.data[0, 0] = -0.0
    with pytest.raises(SwitchError):
        switch.activate("a")


def test_a_parameter_that_is_gone_is_named(scene):
    scene.module.block[0].weight = None
    with pytest.raises(AdapterError, match=r"no parameter 'block\.0\.weight' any more"):
        scene.switch.activate("a")
    assert scene.switch.active == {}
