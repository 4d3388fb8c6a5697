# SPDX-License-Identifier: Apache-2.0
"""Any sequence of actions, failing ones among them: the weights are always what they must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shira
from shira import Switch
from shira.errors import ShiraError
from shira.ops.patch import Exchange

from .models import NAMES, equal, expected, net, pointers, random_adapter, snapshot

names = st.sampled_from("abcd")
scales = st.sampled_from([1.0, 1.0, -0.5, 0.0, 2.0, float("nan")])
combinations = st.dictionaries(names, scales, max_size=3)
actions = st.one_of(
    st.tuples(st.just("load"), names, st.integers(0, 9), st.sampled_from([0.05, 0.5, 1.0])),
    st.tuples(st.just("load misfit"), names),
    st.tuples(st.just("activate"), names),
    st.tuples(st.just("activate"), combinations),
    st.tuples(st.just("fail"), combinations, st.integers(0, 3)),
    st.tuples(st.just("using"), combinations),
    st.tuples(st.just("deactivate")),
    st.tuples(st.just("unload"), names),
    st.tuples(st.just("cast"), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
)


class Story:
    """A switched module beside plain dictionaries that say what must be so."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.module = net(dtype)
        self.base = snapshot(self.module)
        self.switch = Switch(self.module, kept_combinations=2)
        self.adapters = {}
        self.active = {}

    def allowed(self, which) -> bool:
        return all(name in self.adapters and scale == scale for name, scale in which.items())

    def act(self, action, *args) -> None:
        getattr(self, action.replace(" ", "_"))(*args)
        assert self.switch.active == self.active
        assert set(self.switch.loaded) == set(self.adapters)
        assert equal(self.module, expected(self.base, self.adapters, self.active))

    def try_to(self, may: bool, call, *args) -> bool:
        if may:
            call(*args)
        else:
            with pytest.raises(ShiraError):
                call(*args)
        return may

    def load(self, name, seed, density) -> None:
        adapter = random_adapter(self.module, seed, NAMES[seed % 3 :], density)
        if self.try_to(name not in self.adapters, self.switch.load, name, adapter):
            self.adapters[name] = adapter

    def load_misfit(self, name) -> None:
        adapter = random_adapter(net(), 1)
        for delta in (adapter["vector"], adapter["emb.weight"]):
            misfit = shira.Adapter({**adapter, "conv.weight": delta})
            self.try_to(False, self.switch.load, name, misfit)

    def activate(self, which) -> None:
        which = {which: 1.0} if isinstance(which, str) else which
        if self.try_to(self.allowed(which), self.switch.activate, which):
            self.active = which

    def fail(self, which, layer) -> None:
        if not self.allowed(which) or which == self.active:
            return
        real, calls = Exchange.put_in, []

        def faulty(exchange):
            calls.append(exchange)
            real(exchange)
            if len(calls) == layer + 1:
                raise ZeroDivisionError

        Exchange.put_in = faulty
        try:
            self.switch.activate(which)
            self.active = which  # it had fewer layers than that
        except ZeroDivisionError:
            pass
        finally:
            Exchange.put_in = real

    def using(self, which) -> None:
        if self.allowed(which):
            with self.switch.using(which):
                assert equal(self.module, expected(self.base, self.adapters, which))

    def deactivate(self) -> None:
        self.switch.deactivate()
        self.active = {}

    def unload(self, name) -> None:
        may = name in self.adapters and name not in self.active
        if self.try_to(may, self.switch.unload, name):
            del self.adapters[name]

    def cast(self, dtype) -> None:
        # A cast while active rounds replacement values a second time: only what is switched to
        # afterwards, and the base, are what they would be anew.
        self.deactivate()
        self.module.to(dtype)
        self.base = {name: weight.to(dtype) for name, weight in self.base.items()}


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    story=st.lists(actions, max_size=14),
)
def test_the_weights_are_always_what_they_must_be(dtype, story):
    state = Story(dtype)
    where = pointers(state.module)
    cast = False
    for action in story:
        state.act(*action)
        cast = cast or action[0] == "cast"
    assert cast or pointers(state.module) == where
    state.switch.deactivate()
    assert equal(state.module, state.base)
