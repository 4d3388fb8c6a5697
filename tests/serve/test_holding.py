# SPDX-License-Identifier: Apache-2.0
"""A bound on the memory of adapters: who is dropped, and that who comes back is who was dropped."""

from __future__ import annotations

import functools
import itertools
import time

import pytest
import torch

from shira.adapter import Adapter
from shira.errors import (
    AdapterError,
    ConfigError,
    FileFormatError,
    ServeError,
    SwitchError,
    UnknownAdapterError,
)
from shira.serve.holding import checked_limit
from shira.serve.loading import nbytes_of
from shira.serve.messages import Processes
from shira.serve.route import Route
from shira.serve.value_sender import FixedSupport
from tests.interrupts import at_every_point
from tests.serve.test_worker import Cluster, Shared, Threads, adapter_for, merge

NAMES = "abcd"


class Bounded(Cluster):
    """A cluster with adapters in files, of which some fit into memory."""

    def __init__(self, folder, ranks=2, dtype=torch.float32, room=2, names=NAMES):
        super().__init__(ranks, dtype)
        self.folder = folder
        beside = Shared(ranks)
        for rank, held in enumerate(self.held):
            held.beside = Threads(rank, beside)
        self.adapters = {name: adapter_for(self.base, seed) for seed, name in enumerate(names)}
        for name, adapter in self.adapters.items():
            adapter.save(self.path(name))
            self.load(name)
        largest = max(each.nbytes for each in self.held[0].adapters.values())
        self.each = largest + largest // 8  # parts of ranks differ a little
        self.limit(room * self.each)

    def path(self, name):
        return self.folder / f"{name}.safetensors"

    def load(self, name):
        path = self.path(name)
        return self.call(lambda held: held.load(name, lambda: Adapter.load(path), path=str(path)))

    def limit(self, nbytes):
        self.call(lambda held: held.limit(nbytes))

    def in_memory(self):
        (names,) = {"".join(held.adapters) for held in self.held}
        for held in self.held:
            assert not held.holding.on_disk.keys() & held.adapters.keys()
            assert held.holding.limit is None or held.holding.nbytes <= held.holding.limit
        return names

    def right(self, weights):
        self.activate(weights)
        self.expect(merge(self.base, self.adapters, weights))


@pytest.fixture
def bounded(tmp_path):
    cluster = Bounded(tmp_path)
    yield cluster
    cluster.activate({})
    cluster.expect(cluster.base)
    cluster.pool.shutdown()


@pytest.mark.parametrize(
    ("dtype", "values", "each"),
    [
        (torch.float32, torch.float32, 16),
        (torch.bfloat16, torch.float32, 12),
        (torch.float16, torch.bfloat16, 10),
    ],
)
def test_bytes_an_entry(dtype, values, each):
    """What the tensors' memory has, whatever they are views of; no other tensor is kept."""
    cluster = Cluster(1, dtype)
    (loaded,) = cluster.load("a", adapter_for(cluster.base, 1, dtype=values))
    tensors = [
        tensor
        for values, patch in loaded.entries.values()
        for tensor in (values, patch.offsets, patch.originals, patch.replacement)
    ]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert len(memory) == len(tensors)
    assert sum(memory.values()) == nbytes_of(loaded.entries) == loaded.nbytes == each * loaded.nnz


def test_ranks_count_the_largest_part(bounded):
    parts = [nbytes_of(held.adapters["d"].entries) for held in bounded.held]
    assert {held.adapters["d"].nbytes for held in bounded.held} == {max(parts)}


def test_the_least_recently_used_is_dropped_and_read_again(bounded):
    assert bounded.in_memory() == "cd"
    for weights, memory in [
        ({"c": 1.0}, "dc"),
        ({"a": 0.5}, "ca"),
        ({"b": 1.0}, "ab"),
        ({"b": 2.0, "a": -1.0}, "ba"),
        ({}, "ba"),
        ({"d": 1.0}, "ad"),
        ({"d": 1.0}, "ad"),
    ]:
        bounded.right(weights)
        assert bounded.in_memory() == memory


def test_what_is_in_use_stays(bounded):
    bounded.right({"a": 1.0})
    bounded.call(lambda held: held.pin("b"))
    for name in "cd":
        with pytest.raises(AdapterError, match=f"'{name}' cannot be brought back .* in use"):
            bounded.activate({name: 1.0})
        assert bounded.in_memory() == "ab"
    bounded.expect(merge(bounded.base, bounded.adapters, {"a": 1.0}))
    bounded.adapters["e"] = adapter_for(bounded.base, 9)
    bounded.adapters["e"].save(bounded.path("e"))
    bounded.load("e")  # known, and on disk at once
    assert bounded.in_memory() == "ab"
    bounded.call(lambda held: held.pin("b"))
    for _ in range(2):
        assert bounded.in_memory() == "ab"
        bounded.call(lambda held: held.unpin("b"))
    bounded.right({"e": 1.0})
    assert bounded.in_memory() == "ae"
    with pytest.raises(ConfigError, match="'e'"):
        bounded.limit(bounded.each // 2)
    bounded.limit(bounded.each)
    assert bounded.in_memory() == "e"
    bounded.limit(None)
    bounded.right({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0})


def test_who_is_waited_for_goes_last(bounded):
    for held in bounded.held:
        held.holding.waiting = {"c"}
    bounded.right({"a": 1.0})
    assert bounded.in_memory() == "ca"


def test_an_adapter_that_never_fits(bounded):
    bounded.adapters["big"] = adapter_for(bounded.base, 5, k=16)
    bounded.adapters["big"].save(bounded.path("big"))
    bounded.limit(bounded.each)
    with pytest.raises(AdapterError, match=f"'big' takes .* max_adapter_memory={bounded.each}"):
        bounded.load("big")
    with pytest.raises(UnknownAdapterError):
        bounded.activate({"big": 1.0})
    assert not bounded.held[0].knows("big")
    assert bounded.held[0].knows("a")


def change(path):
    adapter = Adapter.load(path)
    Adapter({name: adapter[name] for name in list(adapter)[1:]}).save(path)


def damage(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (change, "another adapter now"),
        (damage, "safetensors"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_a_file_that_is_not_what_it_was(bounded, spoil, told):
    """Refused by the adapter's name and the file's, with what to do; all else goes on."""
    bounded.right({"d": 1.0})
    raw = bounded.path("a").read_bytes()
    spoil(bounded.path("a"))
    for _ in range(2):
        with pytest.raises(AdapterError, match=told) as caught:
            bounded.activate({"a": 1.0})
        assert "adapter 'a' was dropped from memory" in str(caught.value)
        assert f"{bounded.path('a')}" in str(caught.value)
        assert "unload 'a' and load it again" in str(caught.value)
        bounded.expect(merge(bounded.base, bounded.adapters, {"d": 1.0}))
    bounded.right({"b": 1.0})
    bounded.path("a").write_bytes(raw)
    bounded.right({"a": 1.0})
    bounded.call(lambda held: held.activate({}))
    bounded.call(lambda held: held.unload("a"))
    bounded.call(lambda held: held.unload("c"))  # from disk
    assert bounded.in_memory() == "b"
    bounded.adapters["a"] = adapter_for(bounded.base, 7)
    bounded.adapters["a"].save(bounded.path("a"))
    bounded.load("a")
    bounded.right({"a": 1.0})


def test_one_rank_alone_that_cannot_read(bounded):
    bounded.right({"d": 1.0})
    source = bounded.held[1].holding.sources["a"]

    def fail():
        raise FileFormatError("damaged")

    bounded.held[1].holding.sources["a"] = source._replace(read=fail)
    with pytest.raises(AdapterError, match="rank 1: damaged"):
        bounded.activate({"a": 1.0})
    bounded.right({"d": 1.0})
    bounded.held[1].holding.sources["a"] = source
    bounded.right({"a": 1.0})


def test_a_base_that_changed_meanwhile(bounded):
    new = {name: weight * 2 for name, weight in bounded.base.items()}
    for held in bounded.held:
        held.model.load_weights(new.items())
    with pytest.raises(SwitchError, match=r"'a' .* not those of when it was loaded"):
        bounded.activate({"a": 1.0})
    bounded.call(lambda held: held.rebase(check=False))
    bounded.base = new
    bounded.right({"a": 1.0})
    with pytest.raises(AdapterError, match=r"'b', 'd' cannot be brought back .* in use"):
        bounded.activate({"b": 1.0, "d": 0.5})
    bounded.right({})
    bounded.right({"b": 1.0, "d": 0.5})


def test_values_that_were_sent_are_never_dropped_for_those_of_the_file(bounded):
    new = adapter_for(bounded.base, 8)
    new = Adapter({n: type(d)(d.support, new[n].values) for n, d in bounded.adapters["a"].items()})
    fixed = FixedSupport.of(new)
    read = bounded.adapters["a"]
    routes = bounded.call(lambda held: Route(held, "a", lambda: read, fixed.digest))
    values = fixed.flat(new)
    bounded.call(lambda held: next(r for r in routes if r.worker is held).update(values))
    bounded.adapters["a"] = new
    bounded.limit(3 * bounded.each)
    for name in "bcda":
        bounded.right({name: 1.0})
        assert "a" in bounded.in_memory()


# --- beside the engine's steps -------------------------------------------------------------------


def until_ready(bounded, between=lambda: None):
    while not all(bounded.call(lambda held: held.load_ready())):
        between()
        time.sleep(0.001)


def test_loads_go_on_while_others_are_switched_to(bounded):
    """Ranks talk in two threads at once; originals are the base's whatever was active meanwhile."""
    bounded.limit(4 * bounded.each)
    states, switches = itertools.cycle([{"a": 1.0}, {"d": 0.5, "a": 1.0}, {}]), [0]

    def switch():
        switches[0] += 1
        bounded.right(next(states))

    for seed in range(8):
        bounded.adapters["e"] = adapter_for(bounded.base, 20 + seed)
        path = bounded.path("e")
        bounded.adapters["e"].save(path)
        read = functools.partial(Adapter.load, path)
        bounded.call(lambda held, read=read: held.begin_load("e", read))
        switch()
        until_ready(bounded, switch)
        bounded.call(lambda held: held.end_load())
        bounded.right({"e": 1.0, "a": -1.0})
        bounded.right({})
        bounded.call(lambda held: held.unload("e"))
    assert switches[0] >= 8


def test_an_engine_falls_asleep_when_nothing_reads_its_weights_any_more(bounded):
    adapter = bounded.adapters["e"] = adapter_for(bounded.base, 30)

    def read():
        time.sleep(0.2)
        return adapter

    bounded.call(lambda held: held.begin_load("e", read))
    bounded.call(lambda held: held.sleep(1))
    assert all(bounded.call(lambda held: held.load_ready()))
    bounded.call(lambda held: held.end_load())
    bounded.call(lambda held: held.wake())
    bounded.right({"e": 1.0})


def test_what_was_dropped_comes_back_beside_the_steps(bounded):
    bounded.right({"d": 1.0})
    bounded.call(lambda held: held.begin_load("a", None))
    until_ready(bounded)
    assert bounded.in_memory() == "cd"
    bounded.call(lambda held: held.end_load())
    assert bounded.in_memory() == "da"
    for held in bounded.held:
        held.holding.sources.pop("a")  # it is not read again
    bounded.right({"a": 1.0})
    bounded.call(lambda held: held.begin_load("b", None))
    bounded.right({"b": 1.0})  # sooner
    until_ready(bounded)
    bounded.call(lambda held: held.end_load())
    bounded.right({"b": 1.0})


@pytest.mark.parametrize("spoil", [damage, lambda path: path.unlink()])
def test_a_file_that_cannot_be_read_beside_the_steps(bounded, spoil):
    spoil(bounded.path("a"))
    bounded.call(lambda held: held.begin_load("a", None))
    until_ready(bounded)
    with pytest.raises(AdapterError, match="adapter 'a' was dropped from memory and cannot be"):
        bounded.call(lambda held: held.end_load())
    read = functools.partial(Adapter.load, bounded.path("a"))
    bounded.call(lambda held: held.begin_load("e", read))
    until_ready(bounded)
    with pytest.raises((FileFormatError, FileNotFoundError)):
        bounded.call(lambda held: held.end_load())
    assert not bounded.held[0].knows("e")
    bounded.right({"d": 1.0})


def test_a_load_that_is_overtaken(bounded):
    read = functools.partial(Adapter.load, bounded.path("a"))
    begin = functools.partial(lambda name, held: held.begin_load(name, read), "e")
    with pytest.raises(AdapterError, match="'a' is loaded already"):
        bounded.call(lambda held: held.begin_load("a", read))
    with pytest.raises(UnknownAdapterError):
        bounded.call(lambda held: held.begin_load("f", None))
    with pytest.raises(ServeError, match="no load was begun"):
        bounded.call(lambda held: held.end_load())
    bounded.call(begin)
    bounded.call(begin)  # the first is forgotten
    bounded.call(lambda held: held.load("e", read))
    with pytest.raises(AdapterError, match="'e' was loaded meanwhile"):
        bounded.call(lambda held: held.end_load())
    bounded.call(lambda held: held.unload("e"))
    bounded.call(begin)
    bounded.call(lambda held: held.rebase())
    with pytest.raises(ServeError, match="loaded anew while adapter 'e'"):
        bounded.call(lambda held: held.end_load())
    bounded.call(begin)
    bounded.call(lambda held: held.end_load())  # waits
    bounded.adapters["e"] = bounded.adapters["a"]
    bounded.right({"e": 1.0})


def test_an_interrupt_anywhere_leaves_the_adapters_that_there_were(tmp_path):
    cluster = Bounded(tmp_path, ranks=1, room=1)
    (held,) = cluster.held
    held.processes = held.beside = Processes()
    cluster.limit(2 * cluster.each)
    held.require("a")

    def check():
        assert all(held.knows(name) for name in NAMES)
        assert held.holding.nbytes <= held.holding.limit
        held.require("a")

    assert at_every_point(functools.partial(held.require, "b"), check, every=97) > 20
    cluster.right({"b": 1.0})


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "8 GiB"])
def test_a_limit_that_is_none(limit):
    with pytest.raises(ConfigError, match="max_adapter_memory is a number of bytes"):
        checked_limit(limit)


# --- adapters that requests in flight ride on ----------------------------------------------------


def ride(bounded, names):
    for held in bounded.held:
        held.holding.riding = list(names)


def test_what_requests_ride_on_is_never_dropped(bounded):
    assert bounded.in_memory() == "cd"
    ride(bounded, "cd")
    for weights in ({"a": 1.0}, {"c": 1.0, "b": 1.0}):
        with pytest.raises(AdapterError, match=r"cannot be brought back .* requests in flight"):
            bounded.activate(weights)
    bounded.adapters["e"] = bounded.adapters["a"]
    bounded.adapters["e"].save(bounded.path("e"))
    bounded.load("e")  # known, and on disk at once
    with pytest.raises(ConfigError, match=r"'c', 'd'.*requests end"):
        bounded.limit(bounded.each)
    assert bounded.in_memory() == "cd"
    ride(bounded, "d")
    bounded.right({"a": 1.0})
    assert bounded.in_memory() == "da"
    bounded.right({})
    ride(bounded, "db")  # b is about to come
    with pytest.raises(ConfigError, match="'b', 'd'"):
        bounded.limit(bounded.each)
    bounded.limit(2 * bounded.each)
    assert bounded.in_memory() == "d"


def test_a_step_needs_no_room(bounded):
    """Beyond the bound on all ranks alike; what is over is dropped when others need room."""
    ride(bounded, "cd")
    bounded.call(lambda held: held.require("a", beyond=True))
    for held in bounded.held:
        assert list(held.adapters) == ["c", "d", "a"]
        assert held.holding.nbytes > held.holding.limit
    bounded.activate({"a": 1.0})  # needs no room either
    bounded.activate({})
    ride(bounded, "d")
    bounded.right({"b": 1.0})
    assert bounded.in_memory() == "db"
    bounded.path("a").unlink()
    with pytest.raises(AdapterError, match="'a' was dropped from memory"):
        bounded.call(lambda held: held.require("a", beyond=True))
    assert bounded.in_memory() == "db"
