# SPDX-License-Identifier: Apache-2.0
"""Mixed batches of one worker, on a stand-in for vLLM's runner: each row is its own adapter's."""

from __future__ import annotations

import functools
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ServeError, UnknownAdapterError
from shira.masks import random_support
from shira.serve.messages import KEY, carried, scales_of
from shira.serve.mixed import CALM, MixedBatches
from shira.serve.worker import WorkerAdapters
from tests.serve.test_worker import Shared, Threads

IDS, DIM = 11, 6


class UnquantizedEmbeddingMethod:
    def embedding(self, layer, ids):
        return F.embedding(ids, layer.weight)

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


class UnquantizedLinearMethod:
    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


class UnquantizedFusedMoEMethod:
    """vLLM's call by keywords, on two experts, of which each row has one; overwrites x."""

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        if shared_experts is not None:
            shared_experts(shared_experts_input)
        each = torch.einsum("ti,eoi->teo", x, layer.w13_weight).relu()
        each = torch.einsum("teo,eio->tei", each, layer.w2_weight)
        return x.copy_(each[torch.arange(len(x)), topk_ids] * topk_weights[:, None])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant_method = UnquantizedFusedMoEMethod()
        for name, shape in (("w13_weight", (2, 8, DIM)), ("w2_weight", (2, DIM, 8))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=False))
        self.shared = 0  # rows

    def forward(self, x):
        self.shared = 0
        return self.quant_method.apply(
            layer=self,
            x=x,
            topk_weights=x[:, 0].sigmoid(),
            topk_ids=(x[:, 1] > 0).long(),
            shared_experts=self.count,
            shared_experts_input=x,
        )

    def count(self, x):
        self.shared += len(x)


class Layer(nn.Module):
    def __init__(self, shape, method):
        super().__init__()
        self.quant_method = method()
        self.weight = nn.Parameter(torch.randn(shape), requires_grad=False)


class Model(nn.Module):
    """A tied embedding, a linear layer, experts, a norm, and a layer its method never hears of."""

    def __init__(self):
        super().__init__()
        self.embed = Layer((IDS, DIM), UnquantizedEmbeddingMethod)
        self.fc = Layer((DIM, DIM), UnquantizedLinearMethod)
        self.hidden = Layer((DIM, DIM), UnquantizedLinearMethod)
        self.norm = nn.LayerNorm(DIM)
        self.experts = Experts()

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameters[name].data.copy_(weight)

    def forward(self, ids):
        x = self.embed.quant_method.embedding(self.embed, ids)
        x = self.norm(self.fc.quant_method.apply(self.fc, x) @ self.hidden.weight.T)
        return x + self.experts(x.clone())

    def compute_logits(self, x):
        return self.embed.quant_method.apply(self.embed, x)


class Runner:
    """The requests of a batch, in an order that changes; one step at a time."""

    device = torch.device("cpu")

    def __init__(self, model):
        self.model, self.requests, self.num_prompt_logprobs = model, {}, {}
        self.input_batch = SimpleNamespace(req_ids=[])

    def get_model(self):
        return self.model

    def _dummy_run(self, tokens):
        hidden = self.model(torch.zeros(tokens, dtype=torch.long))
        return hidden, hidden

    def _prepare_inputs(self, scheduler_output, counts):
        return counts.cumsum(0) - 1

    def _model_forward(self, ids):
        return self.model(ids)

    def _get_prompt_logprobs_dict(self, hidden, counts):
        starts = dict(zip(self.input_batch.req_ids, counts.cumsum(0) - counts, strict=True))
        sizes = dict(zip(self.input_batch.req_ids, counts, strict=True))
        each = {
            i: self.model.compute_logits(hidden[starts[i] : starts[i] + sizes[i]])
            for i in self.num_prompt_logprobs
        }
        self.num_prompt_logprobs.clear()
        return each

    @torch.inference_mode()
    def step(self, batch):
        """``{request: (ids, value or None)}``, in the order of the batch; hidden states, logits."""
        for each, (_, value) in batch.items():
            extra = {KEY: value} if value is not None else None
            parameters = SimpleNamespace(extra_args=extra)
            self.requests.setdefault(each, SimpleNamespace(sampling_params=parameters))
        self.input_batch.req_ids = list(batch)
        counts = torch.tensor([len(ids) for ids, _ in batch.values()])
        last = self._prepare_inputs(None, counts)
        hidden = self._model_forward(torch.tensor([i for ids, _ in batch.values() for i in ids]))
        logits = self.model.compute_logits(hidden[last])
        self.num_prompt_logprobs = dict.fromkeys(batch, 0)
        scored = self._get_prompt_logprobs_dict(hidden, counts)
        assert self.num_prompt_logprobs == {}
        return hidden.split(counts.tolist()), logits, scored

    def finish(self):
        self.requests.clear()


EXPERTS = ("experts.w13_weight", "experts.w2_weight")
SHAPES = {"embed.weight": (IDS, DIM), EXPERTS[0]: (2, 8, DIM), EXPERTS[1]: (2, DIM, 8)}


def adapter(seed, names=("embed.weight", "fc.weight")):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        shape = SHAPES.get(name, (DIM, DIM))
        support = random_support(shape, 9 + seed, seed=seed, name=name)
        deltas[name] = SparseDelta(support, torch.randn(support.nnz, generator=generator))
    return Adapter(deltas)


@pytest.fixture
def worker():
    torch.manual_seed(0)
    model = Model()
    held = WorkerAdapters(model, torch.float32)
    held.load("a", lambda: adapter(1))
    held.load("b", lambda: adapter(2))
    held.load("c", lambda: adapter(3, ("fc.weight",)))
    held.load("experts", lambda: adapter(5, ("fc.weight", *EXPERTS)))
    held.load("hidden", lambda: adapter(4, ("hidden.weight",)))
    return held, MixedBatches(Runner(model), held)


BATCH = {
    "r1": ([3, 4, 5], "a"),
    "r2": ([7], None),
    "r3": ([3, 4], ["a", 0.5, "b", -1.5]),
    "r4": ([1, 2, 9, 10], "c"),
    "r5": ([5, 5], "a"),
    "r6": ([8, 3, 2], "experts"),
    "r7": ([8, 6], ["experts", 0.5, "a", 2.0]),
}


def alone(mixed, batch):
    """Each request by itself, its adapters written into the weights: hidden states, logits."""
    mixed.settle()
    held, expected = mixed.adapters, {}
    for each, (ids, value) in batch.items():
        held.activate(scales_of(value))
        hidden = held.model(torch.tensor(ids))
        expected[each] = hidden, held.model.compute_logits(hidden)
    held.activate(None)
    return expected


def check(mixed, batch, expected):
    hidden, logits, scored = mixed.runner.step(batch)
    for i, each in enumerate(batch):
        torch.testing.assert_close(hidden[i], expected[each][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[i], expected[each][1][-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scored[each], expected[each][1], atol=1e-5, rtol=1e-5)
    if not mixed.resident:  # the base has the bits of a batch of the base alone
        plain = mixed.runner.model(torch.tensor([i for ids, _ in batch.values() for i in ids]))
        for now, then, (_, value) in zip(
            hidden, plain.split([*map(len, hidden)]), batch.values(), strict=True
        ):
            assert torch.equal(now, then) == (value is None)


def test_each_row_is_its_own_adapters_in_any_order(worker):
    _, mixed = worker
    expected, base = alone(mixed, BATCH), mixed.runner.model.fc.weight.clone()
    names = list(BATCH)
    for order in (names, names[::-1], names[2:] + names[:2]):
        check(mixed, {each: BATCH[each] for each in order}, expected)
    assert mixed.steps == {"resident": 0, "riding": 3, "switches": 0}
    assert torch.equal(mixed.runner.model.fc.weight, base)


def test_who_is_resident(worker):
    held, mixed = worker
    one, two = {"r1": BATCH["r1"], "r5": BATCH["r5"]}, {"r4": BATCH["r4"]}
    expected = alone(mixed, BATCH)
    for each in (one, two):  # one adapter alone: at once
        hidden, _, _ = mixed.runner.step(each)
        assert mixed.resident == ((each[next(iter(each))][1], 1.0),)
        for i, name in enumerate(each):
            assert torch.allclose(hidden[i], expected[name][0], atol=1e-6)
        mixed.runner.finish()
    check(mixed, BATCH, expected)
    assert mixed.resident == ()
    mixed.runner.requests = {each: mixed.runner.requests[each] for each in one}
    for step in range(CALM + 2):
        check(mixed, one, expected)
        assert mixed.resident == ((("a", 1.0),) if step >= CALM - 1 else ())
    mixed.settle()
    assert held.active == {}
    mixed.runner.finish()
    check(mixed, {"r2": BATCH["r2"]}, expected)
    assert mixed.resident == ()


def test_new_values_and_names_that_go(worker):
    held, mixed = worker
    check(mixed, BATCH, alone(mixed, BATCH))
    mixed.runner.finish()
    held.unload("c")
    held.load("c", lambda: adapter(7, ("fc.weight",)))
    check(mixed, BATCH, alone(mixed, BATCH))
    assert len(mixed._riders) == 5
    held.unload("c")
    with pytest.raises(UnknownAdapterError, match="'c'"):
        mixed.runner.step(BATCH)
    mixed.retire("c")  # a request that was cancelled as its adapter was unloaded
    mixed.runner.step(BATCH)


def test_what_cannot_ride(worker):
    held, mixed = worker
    assert mixed.why_not({"a": 1.0, "c": 1.0}) == ""
    assert "'hidden.weight'" in mixed.why_not({"a": 1.0, "hidden": 1.0})
    mixed.runner.step({"r1": ([1], "hidden")})  # alone it is resident
    with pytest.raises(ServeError, match="by switching only"):
        mixed.runner.step({"r1": ([1], "hidden"), "r2": ([2], "a")})
    mixed.settle()
    held.activate("b")
    mixed.runner.finish()
    mixed.runner.step({"r3": ([1], None)})
    with pytest.raises(ServeError, match="put the base back"):
        mixed.runner.step({"r3": ([1], None), "r4": ([1], "a")})


def test_experts_hold_an_adapter_for_its_rows_alone(worker, monkeypatch):
    _, mixed = worker
    experts = mixed.runner.model.experts
    base = [weight.clone() for weight in experts.parameters()]

    def as_before():
        return all(map(torch.equal, experts.parameters(), base))

    check(mixed, BATCH, alone(mixed, BATCH))
    assert as_before()
    mixed.runner.step(BATCH)
    assert experts.shared == sum(len(ids) for ids, _ in BATCH.values())  # once for all rows
    seen = []

    def relu(x):
        seen.append(as_before())
        if len(seen) == 3:
            raise RuntimeError("out of memory")
        return x.clamp(min=0)

    monkeypatch.setattr(torch.Tensor, "relu", relu)
    with pytest.raises(RuntimeError, match="out of memory"):
        mixed.runner.step(BATCH)
    assert seen == [True, False, False]
    assert as_before()


def test_experts_that_are_computed_otherwise_cannot_ride():
    class Pair(UnquantizedFusedMoEMethod):
        def apply(self, layer, x, **given):
            return super().apply(layer, x, **given), None

    Pair.__name__ = "UnquantizedFusedMoEMethod"
    torch.manual_seed(0)
    model = Model()
    model.experts.quant_method = Pair()
    call = model.experts.forward
    model.experts.forward = lambda x: call(x)[0]
    held = WorkerAdapters(model, torch.float32)
    held.load("experts", lambda: adapter(5, ("fc.weight", *EXPERTS)))
    assert "'experts.w13_weight'" in MixedBatches(Runner(model), held).why_not({"experts": 1.0})


def test_where_mixing_cannot_begin_nobody_is_watched():
    torch.manual_seed(0)
    model = Model()
    runner = Runner(model)
    watched = [runner, *(m.quant_method for m in model.modules() if hasattr(m, "quant_method"))]
    model.fc.use_fused_embedding = True

    def fails(tokens):
        raise RuntimeError("no such batch")

    runner._dummy_run = fails
    before = [dict(vars(each)) for each in (*watched, model.fc)]
    with pytest.raises(RuntimeError, match="no such batch"):
        MixedBatches(runner, WorkerAdapters(model, torch.float32))
    assert [vars(each) for each in (*watched, model.fc)] == before


def test_a_layer_that_is_left_out_is_noticed(worker):
    _, mixed = worker
    mixed.runner.model.forward = lambda ids: torch.zeros(len(ids), DIM)
    with pytest.raises(ServeError, match=r"were not computed: '\w+\.weight'"):
        mixed.runner.step(BATCH)


def test_what_requests_bring_along():
    digests = {"a": "1", "b": "2"}
    one, two = carried({"a": 1.0}, digests), carried({"a": 0.5, "b": 2.0}, digests)
    assert (one.value, two.value) == ("a", ["a", 0.5, "b", 2.0])
    assert scales_of(one.value) == {"a": 1.0}
    assert scales_of(two.value) == {"a": 0.5, "b": 2.0}
    assert scales_of(None) == {}
    assert one.salt != carried({"a": 1.0}, {"a": "2"}).salt != two.salt
    for wrong in (["a"], [], 3, ["a", "b"], [1.0, "a"]):
        with pytest.raises(AdapterError):
            scales_of(wrong)


# --- with a bound on memory ----------------------------------------------------------------------


class Bounded:
    """Ranks that each hold all of the model; adapters in files, of which two or so fit."""

    def __init__(self, folder, ranks):
        self.pool, self.mixed, shared = ThreadPoolExecutor(ranks), [], Shared(ranks)
        wanted = [None, ["a", 0.5], *"abcd"]
        self.batch = {f"r{i}": ([i, i + 1], value) for i, value in enumerate(wanted)}
        for rank in range(ranks):
            torch.manual_seed(0)
            model = Model()
            held = WorkerAdapters(model, torch.float32, Threads(rank, shared))
            self.mixed.append((held, Runner(model)))
        for seed, name in enumerate("abcd", 1):
            path = folder / f"{name}.safetensors"
            adapter(seed, ("fc.weight",)).save(path)
            self.call(lambda held, _, name=name, path=path: held.load(
                name, functools.partial(Adapter.load, path), path=str(path)))  # fmt: skip
        self.mixed = [(held, MixedBatches(runner, held)) for held, runner in self.mixed]
        self.expected = self.call(lambda _, mixed: alone(mixed, self.batch))[0]
        self.limit = 2 * max(each.nbytes for each in self.mixed[0][0].adapters.values())
        self.call(lambda held, _: held.limit(self.limit))

    def call(self, step):
        futures = [self.pool.submit(step, *each) for each in self.mixed]
        errors = [future.exception(timeout=20) for future in futures]
        if errors[0] is not None:
            assert all(type(error) is type(errors[0]) for error in errors)
            raise errors[0]
        return [future.result() for future in futures]

    def step(self, *names):
        batch = {each: self.batch[each] for each in names}
        self.call(lambda _, mixed: check(mixed, batch, self.expected))

    def in_memory(self):
        (names,) = {"".join(held.adapters) for held, _ in self.mixed}
        return names


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_on_disk_rides_beyond_the_bound_and_nothing_is_dropped_for_it(tmp_path, ranks):
    bounded = Bounded(tmp_path, ranks)
    assert bounded.in_memory() == "cd"
    bounded.step("r4", "r0")
    bounded.step("r4", "r1", "r2", "r0")
    assert bounded.in_memory() == "dca"
    bounded.step(*bounded.batch)
    assert bounded.in_memory() == "abcd"
    bounded.call(lambda held, mixed: (mixed.settle(), mixed.runner.finish()))
    bounded.call(lambda held, mixed: held.limit(bounded.limit))
    assert bounded.in_memory() == "cd"
    bounded.step("r0")
    bounded.call(lambda held, mixed: mixed.runner.finish())
    bounded.step("r3")  # alone it is resident
    assert {mixed.resident for _, mixed in bounded.mixed} == {(("b", 1.0),)}
    assert bounded.in_memory() == "cdb"


def test_a_rider_whose_file_is_gone_is_not_answered_by_the_base(tmp_path):
    bounded = Bounded(tmp_path, 2)
    (tmp_path / "a.safetensors").unlink()
    for names in (["r2"], ["r1"], ["r2", "r4"]):
        with pytest.raises(AdapterError, match="'a' was dropped from memory"):
            bounded.step(*names)
        bounded.call(lambda _, mixed: mixed.runner.finish())
    bounded.step("r4", "r5")


def test_bytes_an_entry_of_a_rider(tmp_path):
    """As the guide has them."""
    bounded = Bounded(tmp_path, 1)
    ((held, mixed),) = bounded.mixed
    bounded.step("r0", "r1", "r5")
    for ((name, scale),), rider in mixed._riders.items():
        ((_, patch),) = held.adapters[name].entries.values()
        (entries,) = rider.layers.values()
        assert (entries.merged is patch.replacement) == (scale == 1.0)
        assert entries.delta.nbytes == 4 * patch.nnz
        assert entries.indices.nbytes <= 8 * patch.nnz


def test_riders_are_let_go_with_their_adapters(tmp_path):
    bounded = Bounded(tmp_path, 1)
    ((held, mixed),) = bounded.mixed
    bounded.step("r4", "r5", "r0")
    made = {
        scales: weakref.ref(entries.delta)
        for scales, rider in mixed._riders.items()
        for entries in rider.layers.values()
    }
    assert {scales[0][0] for scales in made} == {"c", "d"}
    mixed.runner.finish()
    mixed.settle()
    held.holding.riding = ["d"]
    held.require("a")  # as when a request comes
    assert bounded.in_memory() == "da"
    assert {scales[0][0]: ref() is None for scales, ref in made.items()} == {"c": True, "d": False}
    bounded.step("r5", "r2", "r0")
    mixed.runner.finish()
    mixed.settle()
    held.unload("d")
    assert made[(("d", 1.0),)]() is None
