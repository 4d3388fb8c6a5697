# SPDX-License-Identifier: Apache-2.0
"""The clients' order of steps and their failures, against engines that note what they are told."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from shira.errors import (
    AdapterError,
    ConfigError,
    FileFormatError,
    ServeError,
    UnknownAdapterError,
    WrongBaseError,
)
from shira.serve.client import AsyncClient, Client
from shira.serve.messages import checked, salted, wanted
from shira.serve.scheduler import AdapterScheduler


class Ranks:
    """Workers that hold names only; ``fail[method]`` makes rank 1 refuse."""

    def __init__(self):
        self.adapters, self.active, self.calls, self.fail = {}, {}, [], {}
        self.looks = 0
        self.files = {}  # what stands at a path; else its name

    def call(self, method, args):
        self.calls.append((method, *args))
        if method in self.fail:
            error = self.fail[method]
            if isinstance(error, Exception):
                raise error
            no = {"ok": False, "method": method, "error": error, "message": "no"}
            return [{**no, "rank": rank} for rank in (0, 1)]
        more = {}
        if method == "shira_begin_load":
            self.begun = args
        if method == "shira_load_ready":
            self.looks += 1
            more = {"ready": self.looks % 3 == 0}
        if method == "shira_end_load":
            args = self.begun
        if method == "shira_why_not":
            more = {"why_not": ""}
        if method in ("shira_load", "shira_end_load"):
            content = self.files.get(args[1], args[1])
            if isinstance(content, str):
                self.adapters[args[0]] = args[1]
                more = {"digest": f"digest of {content}"}
            else:
                no = {"ok": False, "method": method, "error": content.__name__, "message": args[1]}
                return [{**no, "rank": rank} for rank in (0, 1)]
        if method == "shira_unload":
            del self.adapters[args[0]]
        previous = self.active
        if method == "shira_activate":
            self.active = dict(args[0])
        state = {"active": dict(self.active), "state": str(self.active), "previous": previous}
        return [{"ok": True, "method": method, "rank": rank, **state, **more} for rank in (0, 1)]


class Engine:
    """What the clients use of ``LLM``."""

    def __init__(self):
        self.ranks, self.log = Ranks(), []
        self.drops, self.busy, self.prompts = True, False, []
        self.llm_engine = SimpleNamespace(
            has_unfinished_requests=lambda: self.busy,
            reset_encoder_cache=lambda: self.log.append("encoder"),
        )

    def collective_rpc(self, method, args=()):
        self.log.append(method)
        return self.ranks.call(method, args)

    def reset_prefix_cache(self, reset_connector=False):
        assert reset_connector
        self.log.append("reset")
        return self.drops

    def generate(self, prompts, params=None, **kwargs):
        self.prompts.append(prompts)
        return prompts

    def sleep(self, level):
        self.log.append(f"sleep {level}")

    def wake_up(self, tags=None):
        self.log.append(f"wake {tags}")


class AsyncEngine:
    """The same of ``AsyncLLM``, on top of the other; requests take time."""

    def __init__(self):
        self.engine = Engine()
        self.paused, self.running, self.mode = False, 0, None
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.seen = []

    async def collective_rpc(self, method, args=()):
        await asyncio.sleep(0)
        if method == "shira_activate":
            assert self.paused, "switched while requests may run"
            assert not self.running
        return self.engine.collective_rpc(method, args)

    async def reset_prefix_cache(self, reset_connector=False):
        return self.engine.reset_prefix_cache(reset_connector)

    async def reset_encoder_cache(self):
        self.engine.log.append("encoder")

    async def is_paused(self):
        return self.paused

    async def pause_generation(self, mode, clear_cache):
        self.engine.log.append("pause")
        self.mode = (mode, clear_cache)
        self.paused = True
        self.resumed.clear()
        while self.running:
            await asyncio.sleep(0)

    async def resume_generation(self):
        self.engine.log.append("resume")
        self.paused = False
        self.resumed.set()

    async def generate(self, prompt, params, request_id):
        await self.resumed.wait()
        self.running += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                self.seen.append((request_id, dict(self.engine.ranks.active)))
                yield prompt
        finally:
            self.running -= 1

    async def sleep(self, level, mode):
        self.engine.log.append(f"sleep {level} {mode}")

    async def wake_up(self, tags=None):
        self.engine.log.append(f"wake {tags}")


# --- LLM -----------------------------------------------------------------------------------------


@pytest.fixture
def llm():
    return Engine()


def test_a_switch_drops_the_caches_after_it(llm):
    client = Client(llm)
    client.load("a", "/adapters/a")
    llm.log.clear()
    client.activate("a", 0.5)
    assert llm.log == ["shira_activate", "encoder", "reset"]
    assert llm.ranks.active == client.active == {"a": 0.5}
    client.deactivate()
    assert llm.ranks.active == client.active == {}


def test_a_bound_on_memory_and_who_is_waited_for(llm):
    client = Client(llm, max_adapter_memory=1000)
    client.limit(None)
    client.waiting = lambda: ["b", "c"]
    client.load("a", "/adapters/a")
    client.activate("a")
    assert llm.ranks.calls[1:] == [
        ("shira_limit", 1000),
        ("shira_limit", None),
        ("shira_load", "a", "/adapters/a", True, ["b", "c"]),
        ("shira_activate", {"a": 1.0}, 1.0, ["b", "c"]),
    ]


def test_caches_that_are_not_dropped_take_the_switch_back(llm):
    client = Client(llm)
    client.activate("a")
    llm.drops = False
    with pytest.raises(ServeError, match="taken back"):
        client.activate("b")
    assert llm.ranks.active == client.active == {"a": 1.0}


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("busy"), ServeError), (KeyboardInterrupt(), None)]
)
def test_caches_whose_dropping_fails_take_the_switch_back(llm, monkeypatch, error, raised):
    def fail(reset_connector):
        raise error

    client = Client(llm)
    client.activate("a")
    monkeypatch.setattr(llm, "reset_prefix_cache", fail)
    with pytest.raises(raised or type(error)):
        client.activate("b")
    assert llm.ranks.active == client.active == {"a": 1.0}


def test_no_switch_and_no_sleep_while_requests_are_unfinished(llm):
    client = Client(llm)
    llm.busy = True
    llm.log.clear()
    for step in (lambda: client.activate("a"), client.deactivate, client.sleep):
        with pytest.raises(ServeError, match="unfinished"):
            step()
    assert llm.log == []


def test_a_refused_switch_touches_no_cache(llm):
    client = Client(llm)
    client.activate("a")
    llm.ranks.fail["shira_activate"] = "UnknownAdapterError"
    llm.log.clear()
    with pytest.raises(UnknownAdapterError, match="no"):
        client.activate("b")
    assert llm.log == ["shira_activate"]
    assert client.active == {"a": 1.0}


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("WrongBaseError", WrongBaseError),
        ("FileFormatError", FileFormatError),
        ("FileNotFoundError", FileNotFoundError),
        ("RuntimeError", ServeError),
        ("SystemExit", ServeError),
        ("Iterable", ServeError),
        ("did_you_mean", ServeError),
    ],
)
def test_an_error_of_the_workers_is_the_same_error_here(llm, kind, error):
    client = Client(llm)
    llm.ranks.fail["shira_load"] = kind
    with pytest.raises(error) as caught:
        client.load("a", "/adapters/a")
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("method", "arguments", "error"),
    [
        ("activate", ("a", float("nan")), AdapterError),
        ("activate", ("a", 10**400), AdapterError),
        ("activate", ("a", True), AdapterError),
        ("activate", ({"a": float("inf")},), AdapterError),
        ("activate", ({"a": "1"},), AdapterError),
        ("activate", ({1: 1.0},), AdapterError),
        ("activate", ({"a\ud800": 1.0},), AdapterError),
        ("activate", (["a"],), AdapterError),
        ("activate", ("",), AdapterError),
        ("check", ("a", float("nan")), AdapterError),
        ("load", ("a\0", "/adapters/a"), AdapterError),
        ("load", (7, "/adapters/a"), AdapterError),
        ("load", ("x" * 1001, "/adapters/a"), AdapterError),
        ("load", ("a", "/adapters/\ud800"), AdapterError),
        ("load", ("a", "/adapters/\0"), AdapterError),
        ("load", ("a", 7), AdapterError),
        ("load", ("a", ""), AdapterError),
        ("unload", (None,), AdapterError),
        ("unload", (["a"],), AdapterError),
        ("sleep", (float("nan"),), ConfigError),
        ("sleep", ("2",), ConfigError),
        ("sleep", (True,), ConfigError),
    ],
)
def test_what_cannot_be_meant_is_not_sent(llm, method, arguments, error):
    client = Client(llm)
    llm.log.clear()
    with pytest.raises(error) as refused:
        getattr(client, method)(*arguments)
    assert len(str(refused.value).encode()) < 500
    assert llm.log == []

    async def main():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)
        engine.engine.log.clear()
        with pytest.raises(error):
            await getattr(client, method)(*arguments)
        assert engine.engine.log == []

    asyncio.run(main())


def test_workers_without_the_extension(llm):
    llm.ranks.fail["shira_list"] = RuntimeError("'CPUWorker' object has no attribute 'shira_list'")
    with pytest.raises(ServeError, match="worker_extension_cls"):
        Client(llm)


def test_an_engine_that_is_none():
    with pytest.raises(ServeError, match="worker_extension_cls"):
        Client(SimpleNamespace)


def test_an_engine_that_died(llm):
    client = Client(llm)
    llm.ranks.fail["shira_activate"] = RuntimeError("Executor failed.")
    with pytest.raises(ServeError, match="started again"):
        client.activate("a")


def test_salts_are_of_the_state_and_caches_stay(llm):
    client = Client(llm, cache="salt")
    llm.log.clear()
    client.activate("a")
    assert llm.log == ["shira_activate"]
    (first,) = client.generate([[1, 2]])
    (text,) = client.generate("text")
    (own,) = client.generate({"prompt": "text", "cache_salt": "mine"})
    assert first == {"prompt_token_ids": [1, 2], "cache_salt": client.salt}
    assert text == {"prompt": "text", "cache_salt": client.salt}
    assert own["cache_salt"] == f"{client.salt}-mine"
    client.activate("b")
    assert client.generate("text")[0]["cache_salt"] != text["cache_salt"]
    client.activate("a")
    assert client.generate("text")[0] == text


def test_without_salts_prompts_are_left_alone(llm):
    assert Client(llm).generate("text") == "text"


def test_sleep_level_two_reloads_before_all_is_awake(llm):
    client = Client(llm)
    client.activate("a")
    llm.log.clear()
    client.sleep(2)
    client.wake_up()
    assert llm.log == [
        "shira_sleep",
        "sleep 2",
        "wake ['weights']",
        "reload_weights",
        "shira_rebase",
        "wake None",
        "encoder",
        "reset",
    ]
    llm.log.clear()
    client.sleep(1)
    client.wake_up()
    awake = ["wake ['weights']", "shira_wake", "wake None"]
    assert llm.log[:5] == ["shira_sleep", "sleep 1", *awake]


def test_two_clients_know_of_each_other(llm):
    one, two = Client(llm), Client(llm, cache="salt")
    one.activate("a")
    assert two.active == {"a": 1.0}
    assert two.generate("text")[0]["cache_salt"] == one.salt


def test_using(llm):
    client = Client(llm)
    client.activate({"a": 0.5, "b": 2})
    with client.using("c"):
        assert llm.ranks.active == {"c": 1.0}
    assert llm.ranks.active == {"a": 0.5, "b": 2.0}


def test_a_cache_policy_that_is_none(llm):
    with pytest.raises(ConfigError, match="'reset' or 'salt', not 'keep'"):
        Client(llm, cache="keep")


# --- AsyncLLM ------------------------------------------------------------------------------------


def run(steps):
    async def bounded():
        await asyncio.wait_for(steps(), timeout=20)

    asyncio.run(bounded())


async def collect(stream):
    return [each async for each in stream]


def test_pause_switch_reset_resume():
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)
        engine.engine.log.clear()
        await client.activate("a")
        assert engine.engine.log == ["pause", "shira_activate", "encoder", "reset", "resume"]
        assert engine.mode == ("wait", False)

    run(steps)


def test_an_engine_that_was_paused_is_not_resumed():
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)
        engine.paused = True
        await client.activate("a")
        assert engine.paused

    run(steps)


@pytest.mark.parametrize("salted", [False, True])
def test_no_request_sees_two_states(salted):
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine, cache="salt" if salted else "reset")
        ours = engine if not salted else client
        asking = []
        for number in range(30):
            asking.append(
                asyncio.ensure_future(collect(ours.generate({"prompt": "x"}, None, number)))
            )
            await asyncio.sleep(0)
            if number % 3 == 0:
                asking.append(asyncio.ensure_future(client.activate("ab"[number % 2])))
        await asyncio.gather(*asking)
        by_request = {}
        for request, active in engine.seen:
            by_request.setdefault(request, []).append(active)
        assert len(by_request) == 30
        assert all(len(states) == 3 and states[0] == states[2] for states in by_request.values())
        assert len({str(states[0]) for states in by_request.values()}) > 1

    run(steps)


def test_a_salt_is_that_of_the_state_which_answers():
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine, cache="salt")

        async def one(number):
            got = await collect(client.generate({"prompt": "x"}, None, number))
            state = next(active for request, active in engine.seen if request == number)
            assert got[0]["cache_salt"] == f"shira-{state}"

        await asyncio.gather(
            *(one(n) for n in range(5)), client.activate("a"), *(one(n) for n in range(5, 9))
        )

    run(steps)


def test_a_cancelled_caller_does_not_stop_a_switch_half_way():
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)
        task = asyncio.ensure_future(client.activate("a"))
        while not engine.paused:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.list()  # waits for the lock
        assert not engine.paused
        assert client.active == {"a": 1.0}
        assert engine.engine.log[-2] == "resume"

    run(steps)


def test_a_cancelled_caller_does_not_stop_loading_half_way():
    async def main():
        for steps in range(6):
            engine = AsyncEngine()
            client = await AsyncClient.of(engine)
            for change in (client.load, client.unload):
                arguments = ["a", "/adapters/a"] if change == client.load else ["a"]
                loading = asyncio.ensure_future(change(*arguments))
                for _ in range(steps):
                    await asyncio.sleep(0)
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
                for _ in range(9):
                    await asyncio.sleep(0)
                assert client.record.adapters.keys() == engine.engine.ranks.adapters.keys()
                if not engine.engine.ranks.adapters:
                    break

    asyncio.run(main())


def test_async_failures_resume_and_say_so():
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)
        await client.activate("a")
        engine.engine.drops = False
        with pytest.raises(ServeError, match="taken back"):
            await client.activate("b")
        assert client.active == engine.engine.ranks.active == {"a": 1.0}
        assert not engine.paused
        engine.engine.ranks.fail["shira_activate"] = "AdapterError"
        with pytest.raises(AdapterError):
            await client.activate("b")
        assert not engine.paused
        with pytest.raises(AdapterError, match="single name"):
            await client.activate({"a": 1.0}, 2.0)

    run(steps)


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("lost", [True, False])
def test_only_what_could_be_taken_back_is_resumed(refused, lost):
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)

        async def reset(reset_connector):
            if lost:
                engine.engine.ranks.fail["shira_activate"] = RuntimeError("worker died")
            if refused:
                return False
            raise RuntimeError("no answer")

        engine.reset_prefix_cache = reset
        first = "no answer" if not refused else "worker died" if lost else "taken back"
        with pytest.raises(ServeError, match=first):
            await client.activate("a")
        assert engine.paused == lost
        assert engine.engine.ranks.active == ({"a": 1.0} if lost else {})

    run(steps)


def test_two_clients_of_one_engine_take_turns():
    async def steps():
        engine = AsyncEngine()
        clients = [await AsyncClient.of(engine) for _ in range(2)]
        engine.engine.log.clear()
        await asyncio.gather(*(client.activate("a") for client in clients))
        once = ["pause", "shira_activate", "encoder", "reset", "resume"]
        assert engine.engine.log == once * 2

    run(steps)


def test_async_sleep_waits_for_requests():
    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)
        await client.activate("a")
        engine.engine.log.clear()
        await client.sleep(2)
        await client.wake_up()
        assert engine.engine.log == [
            "shira_sleep",
            "sleep 2 wait",
            "wake ['weights']",
            "reload_weights",
            "shira_rebase",
            "wake None",
        ]

    run(steps)


# --- an engine that dies -------------------------------------------------------------------------


def test_a_call_that_a_dead_engine_never_answers(llm, monkeypatch):
    monkeypatch.setattr("shira.serve.changes.LOOK", 0.01)
    resources = SimpleNamespace(engine_dead=False)
    llm.llm_engine.engine_core = SimpleNamespace(resources=resources)
    client = Client(llm)
    for_ever = threading.Event()

    def never(method, args=()):
        resources.engine_dead = True
        for_ever.wait()

    monkeypatch.setattr(llm, "collective_rpc", never)
    with pytest.raises(ServeError, match="started again"):
        client.activate("a")
    for_ever.set()


def test_a_call_that_a_dead_async_engine_never_answers(monkeypatch):
    monkeypatch.setattr("shira.serve.changes.LOOK", 0.01)

    async def steps():
        engine = AsyncEngine()
        client = await AsyncClient.of(engine)

        async def never(method, args=()):
            engine.errored = True
            await asyncio.Event().wait()

        engine.collective_rpc = engine.resume_generation = never
        with pytest.raises(ServeError, match="started again"):
            await client.activate("a")

    run(steps)


# --- the gate ------------------------------------------------------------------------------------


async def never(adapter):
    raise AssertionError


def test_the_one_that_waits_alone_goes_before_those_that_come_later():
    async def steps():
        gate, order = AdapterScheduler(never), []
        leave = asyncio.Event()

        async def share(name):
            async with gate.using(None):
                order.append(name)
                await leave.wait()

        async def alone():
            async with gate.alone():
                order.append("alone")

        tasks = [asyncio.ensure_future(share("first"))]
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(alone()))
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(share("late")))
        await asyncio.sleep(0.01)
        assert order == ["first"]
        leave.set()
        await asyncio.gather(*tasks)
        assert order == ["first", "alone", "late"]

    run(steps)


def test_what_requests_bring_along_is_known_whatever_is_active():
    async def steps():
        client = await AsyncClient.of(AsyncEngine(), mixing=True)
        for name in "ab":
            await client.load(name, name)
        await client.activate("a")
        assert (await client.carry("b")).value == "b"
        with pytest.raises(ServeError, match="deactivate"):
            await anext(client.generate("x", None, "r", adapter="b"))

    run(steps)


def test_a_cancelled_wait_leaves_the_gate_open():
    async def steps():
        gate = AdapterScheduler(never)
        async with gate.using(None):
            waiting = asyncio.ensure_future(gate.alone().__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            async with gate.using(None):
                pass

    run(steps)


# --- reports -------------------------------------------------------------------------------------


def test_ranks_in_different_states():
    answers = [
        {"ok": True, "method": "shira_list", "rank": 0, "active": {"a": 1.0}, "state": "x"},
        {"ok": True, "method": "shira_list", "rank": 1, "active": {}, "state": "base"},
    ]
    with pytest.raises(ServeError, match="different states"):
        checked(answers, "shira_list")
    with pytest.raises(ServeError, match="out of step"):
        checked([answers[0], {**answers[0], "method": "shira_load"}], "shira_list")
    with pytest.raises(ServeError, match="no report"):
        checked([None], "shira_list")


def test_wanted():
    assert wanted("a", 2) == {"a": 2.0}
    assert wanted({"a": 1, "b": 2}) == {"a": 1.0, "b": 2.0}
    assert wanted(None) == {}
    with pytest.raises(AdapterError, match="a name, a mapping or None"):
        wanted(["a"])


def test_salted_does_not_change_the_prompt():
    prompt = {"prompt_token_ids": [1]}
    assert salted(prompt, "s") == {"prompt_token_ids": [1], "cache_salt": "s"}
    assert prompt == {"prompt_token_ids": [1]}
