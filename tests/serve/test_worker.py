# SPDX-License-Identifier: Apache-2.0
"""One rank's adapters, and several ranks in threads that agree or change nothing."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shira.adapter import Adapter
from shira.base import fingerprint
from shira.checkpoints.boxes import boxes_between
from shira.checkpoints.conversion import Place, as_it_is
from shira.delta import SparseDelta
from shira.errors import (
    AdapterError,
    FileFormatError,
    PlacementError,
    ServeError,
    SwitchError,
    UnknownAdapterError,
    WrongBaseError,
)
from shira.masks import random_support
from shira.ops.patch import Exchange, same_bits
from shira.serve.messages import Processes
from shira.serve.route import Route
from shira.serve.value_sender import FixedSupport
from shira.serve.worker import WorkerAdapters
from shira.support import Support
from tests.interrupts import at_every_point

# The checkpoint: q and k fused and split by rows over the ranks, down by columns, an embedding
# that every rank keeps whole, an expert that one rank alone keeps.
SHAPES = {"q": (8, 6), "k": (4, 6), "down": (6, 8), "embed": (10, 6), "expert0": (4, 4)}
SHAPES["expert1"] = (4, 4)


class Shard(nn.Module):
    """What rank ``rank`` of ``ranks`` keeps of the checkpoint."""

    def __init__(self, rank, ranks, dtype):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        sizes = {
            "qk": (12 // ranks, 6),
            "down": (6, 8 // ranks),
            "embed": (10, 6),
            "experts": (2 // ranks, 4, 4),
        }
        for name, size in sizes.items():
            self.register_parameter(
                name, nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=False)
            )

    def load_weights(self, weights):
        for name, weight in weights:
            if name in ("q", "k"):
                size, start = (8 // self.ranks, 0) if name == "q" else (4 // self.ranks, 8)
                into = self.qk.data.narrow(0, start // self.ranks, size)
                into.copy_(weight.narrow(0, self.rank * size, size))
            elif name == "down":
                size = 8 // self.ranks
                self.down.data.copy_(weight.narrow(1, self.rank * size, size))
            elif name == "embed":
                self.embed.data.copy_(weight)
            elif name.startswith("expert"):
                here = int(name[-1]) - self.rank * (2 // self.ranks)
                if 0 <= here < 2 // self.ranks:
                    self.experts.data[here].copy_(weight)
            else:
                raise KeyError(f"no module named {name!r}")


class Threads:
    """Ranks of one model as threads: each gathers with the others."""

    def __init__(self, rank, shared):
        self.rank, self.shared = rank, shared

    def gather(self, value):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait(timeout=10)
        values = list(self.shared.values)
        self.shared.barrier.wait(timeout=10)
        return values


class Shared:
    def __init__(self, ranks):
        self.values = [None] * ranks
        self.barrier = threading.Barrier(ranks)


class Cluster:
    """A model on several ranks; a call goes to all of them, and they must answer alike."""

    def __init__(self, ranks=2, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.base = {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in SHAPES.items()
        }
        self.shared = Shared(ranks)
        self.held = []
        for rank in range(ranks):
            model = Shard(rank, ranks, dtype)
            model.load_weights(self.base.items())
            self.held.append(
                WorkerAdapters(model, dtype, Threads(rank, self.shared), stored=self.stored)
            )
        self.pool = ThreadPoolExecutor(ranks)

    def stored(self, name, indices):
        return self.base[name].reshape(-1)[indices.long()] if name in self.base else None

    def call(self, step):
        futures = [self.pool.submit(step, held) for held in self.held]
        errors = [future.exception(timeout=20) for future in futures]
        failed = [error for error in errors if error is not None]
        if failed:
            assert len(failed) == len(errors), "some ranks failed and others did not"
            raise failed[0]
        return [future.result() for future in futures]

    def load(self, name, adapter):
        return self.call(lambda held: held.load(name, lambda: adapter))

    def activate(self, weights):
        self.call(lambda held: held.activate(weights))

    def tensors(self):
        return [
            (held.processes.rank, name, parameter.clone())
            for held in self.held
            for name, parameter in held.model.named_parameters()
        ]

    def expect(self, weights):
        """Every rank holds exactly the shards of these checkpoint weights."""
        for held in self.held:
            other = Shard(held.processes.rank, len(self.held), self.dtype)
            other.load_weights(weights.items())
            for (name, ours), theirs in zip(
                held.model.named_parameters(), other.parameters(), strict=True
            ):
                assert same_bits(ours, theirs), (held.processes.rank, name)


def adapter_for(base, seed, names=SHAPES, dtype=torch.float32, metadata=None, k=9):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        support = random_support(SHAPES[name], k, seed=seed, name=name)
        deltas[name] = SparseDelta(support, torch.randn(k, generator=generator).to(dtype))
    return Adapter(deltas, metadata)


def marks(base, adapter):
    return {
        name: fingerprint(base[name].reshape(-1)[delta.support.indices.long()])
        for name, delta in adapter.items()
    }


def merge(base, adapters, weights):
    """By whole weights: float32 sums in the order of the weights, rounded once."""
    out = {}
    for name, weight in base.items():
        flat, total = weight.reshape(-1).clone(), torch.zeros(weight.numel())
        touched = torch.zeros(weight.numel(), dtype=torch.bool)
        for adapter, scale in weights.items():
            delta = adapters[adapter][name]
            at = delta.support.indices.long()
            total[at] += delta.values.float() * scale
            touched[at] = True
        flat[touched] = (flat[touched].float() + total[touched]).to(weight.dtype)
        out[name] = flat.view_as(weight)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_any_sequence_of_states_is_exact_and_the_base_comes_back(ranks, dtype, data):
    cluster = Cluster(ranks, dtype)
    adapters = {name: adapter_for(cluster.base, seed) for seed, name in enumerate("abc")}
    for name, adapter in adapters.items():
        cluster.load(name, adapter)
    scales = st.sampled_from([1.0, -0.5, 0.3, 0.0])
    for _ in range(4):
        weights = data.draw(st.dictionaries(st.sampled_from("abc"), scales))
        cluster.activate(weights)
        cluster.expect(merge(cluster.base, adapters, weights))
    pointers = [held.model.qk.data_ptr() for held in cluster.held]
    cluster.activate({})
    cluster.expect(cluster.base)
    assert pointers == [held.model.qk.data_ptr() for held in cluster.held]
    assert all(held.active == {} and held.state == "base" for held in cluster.held)


def test_an_interrupt_anywhere_leaves_what_was_active_or_what_was_asked_for():
    cluster = Cluster(1)
    (held,) = cluster.held
    held.processes = Processes()
    adapters = {name: adapter_for(cluster.base, seed) for seed, name in enumerate("ab")}
    for name, adapter in adapters.items():
        held.load(name, lambda adapter=adapter: adapter)
    held.activate({"a": 1.0})

    def check():
        assert held.active in ({"a": 1.0}, {"a": 0.3, "b": 1.0})
        cluster.expect(merge(cluster.base, adapters, held.active))
        held.activate({"a": 1.0})
        cluster.expect(merge(cluster.base, adapters, {"a": 1.0}))

    switch = functools.partial(held.activate, {"a": 0.3, "b": 1.0})
    assert at_every_point(switch, check, every=3) > 100
    held.activate({})
    cluster.expect(cluster.base)


def test_what_is_reported_of_an_adapter():
    cluster = Cluster()
    adapter = adapter_for(cluster.base, 1)
    first, second = cluster.load(
        "a", Adapter(dict(adapter), {"base_fingerprint": marks(cluster.base, adapter)})
    )
    assert first.digest == second.digest
    assert first.nnz == second.nnz == adapter.nnz == 54
    assert first.nnz_here + second.nnz_here == 54 + 9  # both keep the embedding
    assert first.checked == second.checked == first.parameters == 6


def test_states_differ_by_content_scale_and_order():
    cluster = Cluster(1)
    (held,) = cluster.held
    cluster.load("a", adapter_for(cluster.base, 1))
    cluster.load("b", adapter_for(cluster.base, 2))
    states = set()
    for weights in [{}, {"a": 1}, {"a": 0.5}, {"b": 1}, {"a": 1, "b": 1}, {"b": 1, "a": 1}]:
        cluster.activate(weights)
        states.add(held.state)
    assert len(states) == 6
    cluster.activate({})
    cluster.call(lambda held: held.unload("a"))
    cluster.load("a", adapter_for(cluster.base, 3))
    cluster.activate({"a": 1})
    assert held.state not in states  # another adapter under an old name


# --- what is refused, on all ranks alike, with nothing changed -----------------------------------


@pytest.fixture
def cluster():
    cluster = Cluster()
    cluster.load("a", adapter_for(cluster.base, 1))
    cluster.activate({"a": 1.0})
    yield cluster
    cluster.pool.shutdown()


def refused(cluster, error, match, step):
    before = cluster.tensors()
    loaded = [dict(held.adapters) for held in cluster.held]
    with pytest.raises(error, match=match) as caught:
        cluster.call(step)
    for (_, _, was), (_, _, now) in zip(before, cluster.tensors(), strict=True):
        assert torch.equal(was, now)
    assert [dict(held.adapters) for held in cluster.held] == loaded
    cluster.activate({})  # and all go on
    cluster.expect(cluster.base)
    return caught.value


def test_a_wrong_base_is_told_by_the_fingerprint_of_entries_on_several_ranks(cluster):
    adapter = adapter_for(cluster.base, 2)
    wrong = marks(cluster.base, adapter) | {"down": "float32:0123456789abcdef"}
    bad = Adapter(dict(adapter), {"base_fingerprint": wrong})
    refused(cluster, WrongBaseError, "'down'", lambda held: held.load("b", lambda: bad))


def test_the_fingerprint_is_of_the_base_whatever_is_active(cluster):
    again = adapter_for(cluster.base, 1)  # exactly the positions that are changed now
    marked = Adapter(dict(again), {"base_fingerprint": marks(cluster.base, again)})
    assert cluster.load("b", marked)[0].checked == 6


@pytest.mark.parametrize(
    ("served", "made_on", "checked"),
    [
        (torch.float32, torch.bfloat16, 1),
        (torch.bfloat16, torch.float32, 1),
        (torch.float16, torch.bfloat16, 1),
        (torch.bfloat16, torch.bfloat16, 1),
    ],
)
def test_a_fingerprint_in_another_dtype(served, made_on, checked):
    cluster = Cluster(1, served)
    cluster.base = {name: w.to(made_on).to(served) for name, w in cluster.base.items()}
    cluster.held[0].model.load_weights(cluster.base.items())
    adapter = adapter_for(cluster.base, 1, names=["q"])
    at = adapter["q"].support.indices.long()
    mark = fingerprint(cluster.base["q"].reshape(-1)[at].to(made_on))
    (loaded,) = cluster.load("a", Adapter(dict(adapter), {"base_fingerprint": {"q": mark}}))
    assert loaded.checked == checked


def test_entries_without_a_place(cluster):
    support = random_support((16, 6), 20, seed=1)  # twice the rows that q has
    bad = Adapter({"q": SparseDelta(support, torch.ones(20))})
    for held in cluster.held:
        held.stored = lambda name, indices: None
    error = refused(cluster, PlacementError, "'q'", lambda held: held.load("b", lambda: bad))
    assert "entries" in str(error)


def test_whole_tensors_are_refused_by_name(cluster):
    head = {"lm_head.weight": torch.ones(2, 6)}
    bad = Adapter(adapter_for(cluster.base, 2), None, head)
    match = "served model cannot hold whole tensors, and the adapter has 'lm_head.weight'"
    refused(cluster, AdapterError, match, lambda held: held.load("b", lambda: bad))


def test_a_name_that_the_model_does_not_know(cluster):
    bad = Adapter({"z": adapter_for(cluster.base, 1)["q"]})
    refused(cluster, PlacementError, "no module named 'z'", lambda h: h.load("b", lambda: bad))


def test_weights_laid_out_anew_after_loading(cluster):
    cluster.activate({})
    for held in cluster.held:
        held.model.down.data = held.model.down.data.flip(0)
    bad = adapter_for(cluster.base, 2, names=["down"])
    with pytest.raises(PlacementError, match="packed or shuffled"):
        cluster.call(lambda held: held.load("b", lambda: bad))
    cluster.call(lambda held: held.load("b", lambda: bad, compare=False))


def test_a_file_that_one_rank_cannot_read(cluster):
    good = adapter_for(cluster.base, 2)

    def read(held):
        if held.processes.rank == 1:
            raise FileFormatError("damaged")
        return good

    error = refused(
        cluster, FileFormatError, "rank 1: damaged", lambda h: h.load("b", lambda: read(h))
    )
    assert type(error) is FileFormatError


def test_ranks_that_read_different_files(cluster):
    files = [adapter_for(cluster.base, seed) for seed in (2, 3)]
    refused(
        cluster,
        AdapterError,
        "different adapters",
        lambda held: held.load("b", lambda: files[held.processes.rank]),
    )


def test_a_loader_that_refuses_on_one_rank(cluster):
    def no(name, placements):
        raise PlacementError("packed here")

    cluster.held[1].refuse = no
    support = random_support((6, 8), 9, seed=5)
    bad = Adapter({"down": SparseDelta(support, torch.ones(9))})
    for held in cluster.held:
        held._placements.clear()
    refused(cluster, PlacementError, "rank 1: packed", lambda h: h.load("b", lambda: bad))


def test_check_says_what_activate_would_and_changes_nothing(cluster):
    for scale in (1e300, float("nan"), 10**400, True, "1"):
        for ask in (WorkerAdapters.check, WorkerAdapters.activate):
            refused(cluster, AdapterError, "scale|finite", lambda h, a=ask, s=scale: a(h, {"a": s}))
    active = cluster.held[0].active
    before = cluster.tensors()
    cluster.call(lambda held: held.check({"a": 0.5}))
    assert cluster.held[0].active == active
    assert all(torch.equal(x[2], y[2]) for x, y in zip(before, cluster.tensors(), strict=True))


def test_names_and_scales(cluster):
    refused(cluster, UnknownAdapterError, "no adapter 'b'", lambda h: h.activate({"b": 1}))
    refused(
        cluster, AdapterError, "a finite number, not inf", lambda h: h.activate({"a": float("inf")})
    )
    refused(cluster, UnknownAdapterError, "Did you mean 'a'", lambda h: h.unload("aa"))
    taken = adapter_for(cluster.base, 2)
    refused(cluster, AdapterError, "loaded already", lambda h: h.load("a", lambda: taken))
    refused(cluster, AdapterError, "not empty", lambda h: h.load("", lambda: taken))
    cluster.activate({"a": 1})
    refused(cluster, AdapterError, "is active", lambda h: h.unload("a"))


def test_two_names_for_one_weight():
    cluster = Cluster(1)
    (held,) = cluster.held
    load = held.model.load_weights
    held.model.load_weights = lambda weights: load(
        ("embed" if name == "head" else name, weight) for name, weight in weights
    )
    delta = adapter_for(cluster.base, 1)["embed"]
    with pytest.raises(AdapterError, match="'embed' and 'head'"):
        cluster.load("a", Adapter({"embed": delta, "head": delta}))
    assert held.adapters == {}


# --- failing while writing -----------------------------------------------------------------------


def failing_write(monkeypatch, cluster, rank, after=1):
    """The write of one rank fails after it has written, in the middle of what it was to write."""
    write, count = Exchange.put_in, [0]
    storages = {held.model.qk.data_ptr(): held.processes.rank for held in cluster.held}
    storages |= {held.model.down.data_ptr(): held.processes.rank for held in cluster.held}

    def put_in(exchange):
        write(exchange)
        if storages.get(exchange.weight.data_ptr()) == rank:
            count[0] += 1
            if count[0] > after:
                raise RuntimeError("device lost")

    monkeypatch.setattr(Exchange, "put_in", put_in)
    return count


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_in_writing_takes_all_back(cluster, monkeypatch, rank):
    cluster.load("b", adapter_for(cluster.base, 2))
    before = cluster.tensors()
    with monkeypatch.context() as patch:
        count = failing_write(patch, cluster, rank)
        with pytest.raises(ServeError, match=f"rank {rank}: RuntimeError: device lost"):
            cluster.activate({"b": 1.0})
        assert count[0] > 1
    for (_, _, was), (_, _, now) in zip(before, cluster.tensors(), strict=True):
        assert torch.equal(was, now)
    assert all(held.active == {"a": 1.0} for held in cluster.held)
    cluster.activate({"b": 1.0})
    cluster.activate({})
    cluster.expect(cluster.base)


def test_a_rank_that_dies_before_all_have_agreed(cluster, monkeypatch):
    """Rank 1 never comes to the second vote: rank 0 puts its weights back and says so."""
    cluster.load("b", adapter_for(cluster.base, 2))
    before = [p.clone() for p in cluster.held[0].model.parameters()]
    votes = [0]
    gather = cluster.held[1].processes.gather

    def die(value):
        votes[0] += 1
        if votes[0] == 2:
            cluster.shared.barrier.abort()
            raise SystemExit
        return gather(value)

    cluster.held[1].processes.gather = die
    survivor = cluster.pool.submit(cluster.held[0].activate, {"b": 1.0})
    victim = cluster.pool.submit(cluster.held[1].activate, {"b": 1.0})
    assert isinstance(victim.exception(timeout=20), SystemExit)
    with pytest.raises(ServeError, match="cannot be reached"):
        survivor.result(timeout=20)
    for was, now in zip(before, cluster.held[0].model.parameters(), strict=True):
        assert torch.equal(was, now)
    assert cluster.held[0].active == {"a": 1.0}


def test_weights_that_cannot_be_put_back_are_served_no_more(cluster, monkeypatch):
    def fail(change):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(Exchange, "run", fail)
        patch.setattr(Exchange, "roll_back", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            cluster.activate({})
    with pytest.raises(ServeError, match="restart"):
        cluster.activate({})
    for held in cluster.held:
        held.model.load_weights(cluster.base.items())
    cluster.call(lambda held: held.rebase(check=False))
    cluster.activate({})
    cluster.expect(cluster.base)


def test_weights_that_something_else_wrote(cluster):
    cluster.held[1].model.down.data.zero_()
    with pytest.raises(SwitchError, match=r"rank 1: .*rebase"):
        cluster.activate({})
    assert bool((cluster.held[1].model.down == 0).all())


# --- sleep ---------------------------------------------------------------------------------------


def test_weights_that_may_be_freed_are_not_touched(cluster):
    active = [t.clone() for _, _, t in cluster.tensors()]
    cluster.call(lambda held: held.sleep(1))
    cluster.call(lambda held: held.sleep(0))  # no more than a pause
    for step in [
        lambda held: held.activate({}),
        lambda held: held.check({"a": 1.0}),
        lambda held: held.load("b", lambda: adapter_for(cluster.base, 2)),
        lambda held: held.begin_load("b", lambda: adapter_for(cluster.base, 2)),
        lambda held: held.fingerprint(),
    ]:
        with pytest.raises(ServeError, match="asleep"):
            cluster.call(step)
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(active, cluster.tensors(), strict=True))
    cluster.call(lambda held: held.wake())
    cluster.activate({})
    cluster.expect(cluster.base)
    cluster.call(lambda held: held.sleep(0))
    cluster.activate({"a": 1.0})


def test_discarded_weights_are_loaded_anew_and_what_was_active_applied(cluster):
    active = [t for _, _, t in cluster.tensors()]
    cluster.call(lambda held: held.sleep(2))
    for held in cluster.held:
        for parameter in held.model.parameters():
            parameter.data.fill_(float("nan"))  # what sleep level 2 leaves
    for step in [
        lambda held: held.activate({"a": 1.0}),
        lambda held: held.load("b", lambda: adapter_for(cluster.base, 2)),
    ]:
        with pytest.raises(ServeError, match="discarded"):
            cluster.call(step)
    with pytest.raises(WrongBaseError, match="not those of before"):
        cluster.call(lambda held: held.rebase())
    for held in cluster.held:
        held.model.load_weights(cluster.base.items())
    cluster.call(lambda held: held.rebase())
    for was, (_, _, now) in zip(active, cluster.tensors(), strict=True):
        assert torch.equal(was, now)
    cluster.activate({})
    cluster.expect(cluster.base)


def test_a_base_that_was_trained_on(cluster):
    adapter = {"a": adapter_for(cluster.base, 1)}
    cluster.call(lambda held: held.sleep(2))
    new = {name: weight * 2 for name, weight in cluster.base.items()}
    for held in cluster.held:
        held.model.load_weights(new.items())
    with pytest.raises(WrongBaseError, match="check=False"):
        cluster.call(lambda held: held.rebase())
    cluster.call(lambda held: held.rebase(check=False))
    cluster.expect(merge(new, adapter, {"a": 1.0}))
    cluster.activate({})
    cluster.expect(new)


def test_weights_in_other_memory_need_loading_again(cluster):
    cluster.call(lambda held: held.sleep(2))
    held = cluster.held[1]
    held.model.qk = nn.Parameter(held.model.qk.clone(), requires_grad=False)
    with pytest.raises(ServeError, match="other memory"):
        cluster.call(lambda held: held.rebase(check=False))


# --- fingerprint of everything -------------------------------------------------------------------


def test_the_fingerprint_of_the_base_does_not_depend_on_what_is_active(cluster, monkeypatch):
    monkeypatch.setattr("shira.serve.worker._CHUNK", 7)  # several chunks of each storage
    active = cluster.call(lambda held: held.fingerprint())
    cluster.activate({})
    pristine = cluster.call(lambda held: held.fingerprint())
    for one, two in zip(active, pristine, strict=True):
        assert one["base"] == two["base"] == two["weights"] != one["weights"]
    assert pristine[0] != pristine[1]


# --- other values at the same positions ----------------------------------------------------------


def test_updated_entries_are_those_of_an_adapter_with_the_values(cluster):
    (held, *_) = cluster.held
    (storage, *_), loaded = held.adapters["a"].entries, held.adapters["a"]
    adapter = adapter_for(cluster.base, 1)
    new = Adapter({n: SparseDelta(d.support, torch.randn(d.nnz)) for n, d in adapter.items()})
    fixed = FixedSupport.of(new)
    routes = cluster.call(lambda held: Route(held, "a", lambda: adapter, fixed.digest))
    values = fixed.flat(new)
    cluster.call(lambda held: next(r for r in routes if r.worker is held).update(values))
    cluster.activate({})
    cluster.load("b", new)
    updated, expected = (held.adapters[name].entries[storage].patch for name in "ab")
    assert updated.offsets is loaded.entries[storage].patch.offsets
    assert torch.equal(updated.originals, expected.originals)
    assert torch.equal(updated.replacement, expected.replacement)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_that_are_one_parameter_and_a_tensor_each_in_the_file(ranks, dtype):
    """As `Place.split` tells; the entries of ``expert1`` come first there, transposed."""
    cluster = Cluster(ranks, dtype)
    base = cluster.base
    views = [torch.empty(2, 4, 4, device="meta")[i].t() for i in (1, 0)]
    source = tuple(
        (box, as_it_is(f"expert{i}", (4, 4)).source)
        for i, view in enumerate(views)
        for box in boxes_between(view, torch.empty(4, 4, device="meta"))
    )
    place = Place((2, 4, 4), source)
    whole = torch.stack([base["expert1"].t(), base["expert0"].t()]).contiguous()
    for held in cluster.held:
        held.split = lambda name, each: place.split(each.indices)
        held.stored = lambda name, indices: whole.view(-1)[indices.long()]
    support = Support((2, 4, 4), torch.randperm(32)[:20].sort().values)
    delta = SparseDelta(support, torch.randn(20))
    made = fingerprint(whole.view(-1)[support.indices.long()])
    adapter = Adapter({"experts": delta}, {"base_fingerprint": {"experts": made}})
    (loaded, *_) = cluster.load("a", adapter)
    assert loaded.checked == 1
    cluster.activate("a")
    (merged,) = merge({"experts": whole}, {"a": adapter}, {"a": 1.0}).values()
    cluster.expect({**base, "expert1": merged[0].t(), "expert0": merged[1].t()})
    cluster.activate(None)
    cluster.expect(base)
