# SPDX-License-Identifier: Apache-2.0
"""Requests that bring adapters along under a bound on memory, by both clients.

The engine's workers are names and bytes in a real `Holding`; a request that runs in it looks, at
each of its steps, that its adapters are in memory.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace

import pytest

from shira.errors import AdapterError, ConfigError, ServeError, ShiraError, UnknownAdapterError
from shira.serve.client import AsyncClient, Client
from shira.serve.holding import Holding, Source
from shira.serve.loading import LoadedAdapter
from shira.serve.messages import KEY, scales_of, wanted
from shira.serve.riders import Riders

SIZE, ROOM = 100, 250  # two of the four fit
NAMES = "abcd"


class Workers:
    """The methods of the extension that matter here; ``calls`` are those that were called."""

    def __init__(self):
        self.holding, self.active, self.calls, self.gone, self.looks = Holding(), {}, [], set(), 0

    def __call__(self, method, args):
        self.calls.append(method)
        held = self.holding
        try:
            said = getattr(self, method.removeprefix("shira_"))(*args) or {}
        except ShiraError as error:
            told = {"error": type(error).__name__, "message": str(error)}
            return [{"ok": False, "method": method, "rank": 0, **told, **held.report()}]
        assert held.limit is None or held.nbytes <= held.limit
        state = {"active": dict(self.active), "state": str(self.active), **held.report()}
        return [{"ok": True, "method": method, "rank": 0, **state, **said}]

    def list(self):
        pass

    def mix(self):
        pass

    def fingerprint(self):
        return {"base": "of the base", "weights": str(self.active)}

    def told(self, waiting=(), riding=()):
        self.holding.waiting, self.holding.riding = waiting, riding

    def limit(self, nbytes, *told):
        self.told(*told)
        self.holding.set_limit(nbytes, self.active)

    def load(self, name, path, compare=True, *told):
        self.told(*told)
        loaded = LoadedAdapter({}, name, SIZE, 1, 0, SIZE, SIZE, None)
        self.holding.add(name, loaded, Source(lambda: None, path), self.active)
        return {"digest": name, "why_not": "it is odd" if path.endswith("odd") else ""}

    def begin_load(self, name, path, compare):
        self.begun = name, path, compare
        if path is None:
            self.holding.known(name)

    def load_ready(self):
        self.looks += 1
        return {"ready": self.looks % 4 == 0}

    def end_load(self, *told):
        name, path, compare = self.begun
        if path is not None:
            return self.load(name, path, compare, *told)
        self.told(*told)
        return self.bring_back([name])

    def bring_back(self, names):
        names = [name for name in names if self.holding.known(name)]
        self.holding.make_room(names, self.active)
        if self.gone.intersection(names):
            raise AdapterError("its file is gone")
        for name in names:
            if name in self.holding.on_disk:
                self.holding.bring_back(name, self.holding.on_disk[name])
            self.holding.use(name)

    def unload(self, name):
        self.holding.forget(name)

    def check(self, weights, scale=1.0, *told):
        self.told(*told)
        self.bring_back(wanted(weights, scale))

    def why_not(self, weights, *told):
        self.told(*told)
        self.bring_back(weights)
        return {"why_not": ""}

    def activate(self, weights, scale=1.0, *told):
        self.told(*told)
        previous, which = self.active, wanted(weights, scale)
        self.bring_back(which)
        self.active = which
        return {"previous": previous}

    def run(self, parameters):
        """A step of a request."""
        names = scales_of((parameters.extra_args or {}).get(KEY))
        assert names.keys() <= self.holding.in_memory.keys(), "not in memory"
        return "".join(names)


class Parameters(SimpleNamespace):
    extra_args = None

    def clone(self):
        return Parameters(**vars(self))


class LLM:
    """What `Client` uses of ``vllm.LLM``."""

    def __init__(self):
        self.workers = Workers()
        self.llm_engine = SimpleNamespace(
            has_unfinished_requests=lambda: False, reset_encoder_cache=lambda: None
        )

    def collective_rpc(self, method, args=()):
        return self.workers(method, args)

    def reset_prefix_cache(self, reset_connector=False):
        return True

    def generate(self, prompts, parameters=None):
        return [self.workers.run(each) for each in parameters]


class AsyncLLM:
    """What `AsyncClient` uses of ``AsyncLLM``; a request ends when it is let go."""

    def __init__(self):
        self.workers, self.running, self.log = Workers(), {}, []

    async def collective_rpc(self, method, args=()):
        await asyncio.sleep(0)
        return self.workers(method, args)

    async def reset_prefix_cache(self, reset_connector=False):
        return True

    async def nothing(self, *args, **kwargs):
        return False

    reset_encoder_cache = is_paused = pause_generation = resume_generation = nothing

    async def generate(self, prompt, parameters, request_id):
        self.running[request_id] = asyncio.Event()
        try:
            while not self.running[request_id].is_set():
                yield self.workers.run(parameters)
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)  # it hears of the end after a while
            self.workers.run(parameters)
            del self.running[request_id]
            self.log.append(request_id)


class Site:
    """An engine that mixes, with four adapters of which two fit; requests by name."""

    async def start(self):
        self.engine = AsyncLLM()
        self.workers = self.engine.workers
        self.client = await AsyncClient.of(self.engine, mixing=True, max_adapter_memory=ROOM)
        for name in NAMES:
            await self.client.load(name, f"/{name}")
        self.riders, self.tasks = self.client._shared.riders, {}
        self.workers.calls.clear()
        return self

    def ask(self, request, adapter):
        async def collect():
            stream = self.client.generate("x", Parameters(), request, adapter=adapter)
            return {each async for each in stream}

        self.tasks[request] = asyncio.ensure_future(collect())

    async def settle(self):
        for _ in range(400):
            await asyncio.sleep(0)

    async def end(self, *requests):
        for request in requests:
            self.engine.running[request].set()
            adapters = await self.tasks.pop(request)
            assert len(adapters) == 1
        await self.settle()

    def on_board(self):
        return "".join(sorted(self.riders.on_board.elements()))


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch):
    monkeypatch.setattr("shira.serve.client._LOOK_AT_LOAD", (0, 0))


def on_site(test):
    async def main():
        site = await Site().start()
        await asyncio.wait_for(test(site), 20)
        for request in list(site.tasks):
            await site.end(request)
        assert site.engine.running == {}
        assert not site.riders.on_board
        assert not site.riders.in_line
        assert not site.client._lock.locked()

    asyncio.run(main())


def test_who_is_in_memory_asks_the_workers_nothing_and_who_is_not_comes_back():
    async def test(site):
        assert site.workers.holding.in_memory.keys() == {"c", "d"}
        site.ask("r1", "c")
        site.ask("r2", {"c": 0.5, "d": 2.0})
        await site.settle()
        assert site.engine.running.keys() == {"r1", "r2"}
        assert site.workers.calls == ["shira_why_not"]  # of both together
        await site.end("r1", "r2")
        site.ask("r3", {"c": 0.5, "d": 2.0})
        await site.settle()
        assert site.workers.calls == ["shira_why_not"]
        await site.end("r3")
        for i in range(5):  # one load for all
            site.ask(f"a{i}", "a")
        await site.settle()
        assert len(site.engine.running) == 5
        assert site.workers.calls.count("shira_begin_load") == 1
        assert site.workers.calls.count("shira_end_load") == 1
        assert site.on_board() == "aaaaa"

    on_site(test)


def test_in_flight_ones_are_never_dropped():
    """Whatever else is loaded, checked, activated or bounded meanwhile."""

    async def test(site):
        site.ask("r1", "a")
        site.ask("r2", "b")
        await site.settle()
        assert site.workers.holding.in_memory.keys() == {"a", "b"}
        await site.client.load("e", "/e")
        assert "e" in site.workers.holding.on_disk
        assert await site.client.why_not("e") == ""  # known without its entries
        with pytest.raises(ConfigError, match="requests end"):
            await site.client.limit(SIZE)
        checking = asyncio.ensure_future(site.client.check({"c": 0.5}))
        switching = asyncio.ensure_future(site.client.activate("d"))
        await site.settle()
        assert not checking.done()
        assert not switching.done()
        assert site.workers.holding.in_memory.keys() == {"a", "b"}
        await site.end("r1", "r2")
        await checking
        await switching
        assert site.client.active == {"d": 1.0}
        await site.client.deactivate()

    on_site(test)


def test_who_needs_room_waits_in_the_order_of_coming():
    async def test(site):
        for request, adapter in [("r1", "a"), ("r2", "b"), ("r3", {"c": 1, "d": 1}), ("r4", "a"),
                                 ("r5", "c"), ("base", None)]:  # fmt: skip
            site.ask(request, adapter)
            await site.settle()
        assert site.engine.running.keys() == {"r1", "r2", "base"}  # r4 does not go before r3
        assert sorted(site.riders.in_line.elements()) == ["a", "c", "c", "d"]
        await site.end("r1")
        assert site.engine.running.keys() == {"r2", "base"}
        await site.end("r2")
        assert site.engine.running.keys() == {"r3", "base"}
        await site.end("r3")
        assert site.engine.running.keys() == {"r4", "r5", "base"}
        assert site.on_board() == "ac"

    on_site(test)


def test_a_request_that_is_given_up_leaves_no_trace():
    """In line, while its adapter comes back, and while it runs: then the engine hears of it."""

    async def test(site):
        site.ask("r1", "a")
        site.ask("r2", "b")
        await site.settle()
        for steps in range(30):
            site.ask("first", "c")
            site.ask("second", "d")
            for _ in range(steps):
                await asyncio.sleep(0)
            for request in ("first", "second"):
                site.tasks[request].cancel()
                with pytest.raises(asyncio.CancelledError):
                    await site.tasks.pop(request)
            assert site.on_board() == "ab"
            assert not site.riders.in_line
        await site.end("r2")
        for steps in range(40):
            site.ask("r3", "cd"[steps % 2])
            for _ in range(steps):
                await asyncio.sleep(0)
            site.tasks["r3"].cancel()
            with suppress(asyncio.CancelledError):
                await site.tasks.pop("r3")
            assert site.on_board() == "a"
            assert site.engine.running.keys() == {"r1"}
        assert "r3" in site.engine.log
        await site.settle()

    on_site(test)


def test_an_answer_that_is_not_read_to_its_end():
    async def test(site):
        stream = site.client.generate("x", Parameters(), "r1", adapter="c")
        assert await anext(stream) == "c"
        await stream.aclose()
        assert site.engine.log == ["r1"]
        assert site.engine.running == {}

    on_site(test)


def test_nothing_goes_before_those_in_line():
    """What they need is dropped last; a switch takes no room ahead of them."""

    async def test(site):
        await site.client.limit(3 * SIZE)
        await site.client.load("e", "/e")
        site.ask("r1", "a")
        await site.settle()
        site.ask("r2", dict.fromkeys("bcd", 1.0))
        await site.settle()
        assert list(site.workers.holding.in_memory) == ["d", "e", "a"]
        await site.client.load("f", "/f")
        assert list(site.workers.holding.in_memory) == ["d", "a", "f"]
        site.workers.calls.clear()
        switching = asyncio.ensure_future(site.client.activate("e"))
        await site.settle()
        assert site.workers.calls == []
        await site.end("r1")
        assert site.engine.running.keys() == {"r2"}
        await site.end("r2")
        await switching
        await site.client.deactivate()

    on_site(test)


def test_who_can_never_have_room_is_told_and_nobody_waits_behind_him():
    async def test(site):
        site.ask("r1", "a")
        site.ask("wide", {"a": 1, "b": 1, "c": 1})
        site.ask("r2", "b")
        await site.settle()
        assert site.engine.running.keys() == {"r1", "r2"}
        with pytest.raises(AdapterError, match=r"'a', 'b', 'c' take 300 bytes .* is 250"):
            await site.tasks.pop("wide")
        site.ask("r3", "c")
        await site.settle()
        await site.client.limit(3 * SIZE)  # who waits has room now
        await site.settle()
        assert site.engine.running.keys() == {"r1", "r2", "r3"}
        site.ask("r4", {"d": 1.0, "a": 1.0})
        await site.settle()
        await site.end("r1", "r2")
        assert "r4" in site.engine.running

    on_site(test)


def test_one_that_cannot_be_read_again_fails_alone():
    async def test(site):
        site.workers.gone.add("a")
        site.ask("r1", "a")
        site.ask("r2", "b")
        with pytest.raises(AdapterError, match="its file is gone"):
            await site.tasks.pop("r1")
        await site.settle()
        assert site.on_board() == "b"
        assert site.workers.holding.in_memory.keys() == {"d", "b"}
        site.ask("r3", "c")  # which was dropped for the first
        await site.settle()
        assert site.on_board() == "bc"
        with pytest.raises(UnknownAdapterError):
            await anext(site.client.generate("x", Parameters(), "r", adapter="e"))

    on_site(test)


def test_one_that_cannot_ride_is_not_read_for_that():
    async def test(site):
        await site.client.load("e", "odd")
        await site.client.activate({"a": 1.0, "b": 1.0})
        await site.client.deactivate()
        site.workers.calls.clear()
        assert await site.client.why_not("e") == "it is odd"
        with pytest.raises(ServeError, match="it is odd: activate it instead"):
            await site.client.carry("e")
        assert site.workers.calls == []
        assert "e" in site.workers.holding.on_disk

    on_site(test)


def test_unloading_waits_for_those_that_wait_for_room_and_stops_nobody_on_the_way():
    """A change that waits for requests to end leaves them the lock that they need for that."""

    async def test(site):
        site.ask("r1", "a")
        site.ask("r2", "b")
        site.ask("r3", "c")
        await site.settle()
        unloading = asyncio.ensure_future(site.client.unload("c"))
        await site.settle()
        site.ask("late", "c")
        await site.settle()
        await site.end("r1")
        assert site.engine.running.keys() == {"r2", "r3"}
        await site.end("r2", "r3")
        await unloading
        with pytest.raises(UnknownAdapterError):
            await site.tasks.pop("late")

    on_site(test)


def test_a_switch_and_a_request_that_begin_at_once():
    async def test(site):
        switching = asyncio.ensure_future(site.client.unload("c"))
        site.ask("r1", "d")
        await site.settle()
        await site.end("r1")
        await switching

    on_site(test)


def test_many_requests_at_random():
    async def test(site):
        import random

        draw = random.Random(0)
        for i in range(150):
            count = draw.choice([0, 1, 1, 1, 2])
            site.ask(f"r{i}", dict.fromkeys(draw.sample(NAMES, count), 1.0) or None)
            for _ in range(draw.randrange(30)):
                await asyncio.sleep(0)
            if i % 7 == 0:
                cancelled = draw.choice(list(site.tasks))
                site.tasks[cancelled].cancel()
                with suppress(asyncio.CancelledError):
                    await site.tasks.pop(cancelled)
            if site.engine.running and draw.random() < 0.7:
                await site.end(draw.choice(list(site.engine.running)))
        while site.tasks:
            assert site.engine.running, "all of them wait"
            await site.end(*list(site.engine.running)[:1])

    on_site(test)


# --- the client of an LLM ------------------------------------------------------------------------


@pytest.fixture
def client():
    client = Client(LLM(), mixing=True, max_adapter_memory=ROOM)
    for name in NAMES:
        client.load(name, f"/{name}")
    return client


def test_a_call_has_all_its_adapters_in_memory(client):
    workers = client.llm.workers
    for brought in (["a", None, "b"], ["d", "a", {"d": 0.5}], ["c", "b", {"b": 1.0, "c": 1.0}]):
        expected = ["".join(wanted(each)) for each in brought]
        assert client.generate(["x"] * 3, Parameters(), adapters=brought) == expected
        assert not client._shared.riders.on_board
    before, workers.calls = list(workers.holding.in_memory), []
    with pytest.raises(AdapterError, match=r"'a', 'b', 'c' take 300 bytes .* is 250: ask for few"):
        client.generate(["x"] * 3, Parameters(), adapters=["a", "b", "c"])
    with pytest.raises(UnknownAdapterError):
        client.generate(["x"] * 2, Parameters(), adapters=["a", "e"])
    assert workers.calls == []
    assert list(workers.holding.in_memory) == before
    workers.gone.add("a")
    with pytest.raises(AdapterError, match="its file is gone"):
        client.generate("x", Parameters(), adapters="a")
    assert not client._shared.riders.on_board
    assert client.generate(["x"], Parameters(), adapters="b") == ["b"]


def test_what_is_pinned_takes_room(client):
    client.generate(["x"], Parameters(), adapters="a")
    client.llm.workers.holding.pin("a")
    client.list()
    with pytest.raises(AdapterError, match=r"'b', 'c' take 200 bytes .* beside the 100 of 'a'"):
        client.generate(["x"] * 2, Parameters(), adapters=["b", "c"])
    assert client.generate(["x"] * 2, Parameters(), adapters=["b", "a"]) == ["b", "a"]


def test_counting():
    riders = Riders()
    with riders.aboard("ab"), riders.aboard("a"):
        assert riders.on_board == {"a": 2, "b": 1}
    assert riders.on_board == {}


def test_fingerprints_are_equal_while_the_weights_are_whatever_is_loaded(client):
    before = client.fingerprint()
    assert before[0]["base"] == "of the base"
    client.load("e", "e")
    client.limit(2 * SIZE)
    assert client.fingerprint() == before
