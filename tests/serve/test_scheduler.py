# SPDX-License-Identifier: Apache-2.0
"""`AdapterScheduler` with an engine that only keeps a record, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import ConfigError
from shira.serve.scheduler import AdapterScheduler

from .virtual_time import run

ADAPTERS = [None, "a", "b", "c"]


class Engine:
    """Switches in `seconds`; knows which adapter answers, and what it must never see."""

    def __init__(self, seconds: float = 0.0, broken: tuple = ()) -> None:
        self.seconds, self.broken = seconds, broken
        self.active, self.inside, self.switches = None, 0, []

    async def activate(self, adapter) -> None:
        assert self.inside == 0, "switched under a running request"
        await asyncio.sleep(self.seconds)
        assert self.inside == 0, "let a request in during a switch"
        if adapter in self.broken:
            raise RuntimeError(f"no {adapter}")
        self.active = adapter
        self.switches.append(adapter)


class Load:
    """Requests at given times; what became of each."""

    def __init__(self, engine: Engine, patience: float) -> None:
        self.engine = engine
        self.scheduler = AdapterScheduler(engine.activate, patience=patience)
        self.waits, self.arrived, self.order, self.errors = {}, [], [], {}

    async def request(self, number, at, adapter, seconds) -> None:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(at)
        self.arrived.append((adapter, number))
        try:
            async with self.scheduler.using(adapter):
                self.waits[number] = clock() - at
                self.order.append((adapter, number))
                self.engine.inside += 1
                answered_by = [self.engine.active]
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self.engine.inside -= 1
                answered_by.append(self.engine.active)
                assert answered_by == [adapter, adapter]
        except RuntimeError as error:
            self.errors[number] = error

    async def all(self, requests) -> None:
        tasks = [
            asyncio.ensure_future(self.request(number, at + number / 1000, *rest))
            for number, (at, *rest) in enumerate(requests)  # no two things at one moment
        ]
        await asyncio.gather(*tasks)


tenths = st.integers(0, 40).map(lambda n: n / 10)
requests = st.lists(st.tuples(tenths, st.sampled_from(ADAPTERS), tenths), max_size=40)


@settings(deadline=None, max_examples=150)
@given(requests=requests, patience=st.sampled_from([0.0, 0.3, 2.0]), switch=tenths)
def test_every_request_by_its_own_adapter_within_the_bound_in_order(requests, patience, switch):
    engine = Engine(seconds=switch)
    load = Load(engine, patience)
    run(load.all(requests))
    assert len(load.waits) == len(requests)
    longest = max((seconds for _, _, seconds in requests), default=0.0)
    bound = patience + len(ADAPTERS) * (longest + switch)
    assert all(wait <= bound + 1e-6 for wait in load.waits.values())
    for adapter in ADAPTERS:
        in_order = [
            [number for key, number in lst if key == adapter] for lst in (load.order, load.arrived)
        ]
        assert in_order[0] == in_order[1]
    assert load.scheduler.running == 0
    assert load.scheduler.waiting == {}
    assert load.scheduler.switches == len(engine.switches)


@settings(deadline=None, max_examples=60)
@given(requests=requests, data=st.data())
def test_cancelled_requests_leave_no_trace(requests, data):
    engine = Engine(seconds=0.2)
    load = Load(engine, 0.3)
    cancelled = {
        number: data.draw(tenths) for number in range(len(requests)) if data.draw(st.booleans())
    }

    async def main():
        tasks = [asyncio.ensure_future(load.request(n, *r)) for n, r in enumerate(requests)]
        for number, at in cancelled.items():
            asyncio.get_running_loop().call_later(at, tasks[number].cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(tasks[n].exception() is None for n in range(len(tasks)) if n not in cancelled)
        await asyncio.sleep(1)

    run(main())
    assert load.scheduler.running == 0
    assert load.scheduler.waiting == {}


def test_cancelled_in_the_moment_of_being_let_in():
    async def main():
        engine = Engine()
        scheduler = AdapterScheduler(engine.activate)

        async def wants_b():
            async with scheduler.using("b"):
                raise AssertionError("was cancelled")

        async with scheduler.using(None):
            task = asyncio.ensure_future(wants_b())
            await asyncio.sleep(0.1)
        while not scheduler.running:  # the switch; then b is let in, but has not woken up
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert scheduler.running == 0

    run(main())


def test_requests_are_grouped():
    """Interleaved arrivals while one request runs: one switch for each adapter, not for each."""
    engine = Engine()
    load = Load(engine, patience=5.0)
    run(load.all([(0, None, 1.0)] + [(0.1, "ab"[i % 2], 1.0) for i in range(20)]))
    assert engine.switches == ["a", "b"]


def test_the_door_closes_after_patience():
    """A stream for the active adapter that would never end lets the other one through."""
    engine = Engine()
    load = Load(engine, patience=1.0)
    stream = [(i / 10, None, 1.0) for i in range(100)]
    run(load.all([*stream, (0.55, "a", 1.0)]))
    assert load.waits[100] == pytest.approx(2.0, abs=0.15)  # patience, and what was running
    assert engine.switches == ["a", None]


def test_who_cannot_be_switched_to_gets_the_error_and_the_others_go_on():
    engine = Engine(seconds=0.1, broken=("b",))
    load = Load(engine, patience=0.0)
    run(load.all([(0, "a", 1), (0.1, "b", 1), (0.2, "b", 1), (0.3, "a", 1), (0.3, None, 1)]))
    assert set(load.errors) == {1, 2}
    assert all("no b" in str(error) for error in load.errors.values())
    assert len(load.order) == 3


def test_alone():
    async def main():
        engine = Engine()
        scheduler = AdapterScheduler(engine.activate, patience=9.0)
        seen = []

        async def request(adapter, seconds):
            async with scheduler.using(adapter):
                engine.inside += 1
                await asyncio.sleep(seconds)
                engine.inside -= 1
                seen.append((adapter, engine.active))

        async def alone():
            await asyncio.sleep(0.1)
            async with scheduler.alone():
                assert engine.inside == 0
                assert scheduler.waiting == {None: 1}
                await asyncio.sleep(1)
                assert engine.inside == 0
                engine.active = "x"  # something else was put into the weights
                scheduler.assume("x")
            seen.append("alone")

        async def late():
            await asyncio.sleep(0.2)
            await request(None, 0.1)

        await asyncio.gather(request(None, 0.5), alone(), late())
        assert seen == [(None, None), "alone", (None, None)]
        assert engine.switches == [None]

    run(main())


def test_fail_ends_who_waits_for_an_adapter_that_is_unloaded():
    async def main():
        engine = Engine()
        scheduler = AdapterScheduler(engine.activate, patience=9.0)

        async def wants_a():
            async with scheduler.using("a"):
                pass

        async with scheduler.using(None):
            tasks = [asyncio.ensure_future(wants_a()) for _ in range(3)]
            await asyncio.sleep(0.1)
            assert scheduler.waiting == {"a": 3}
            assert scheduler.fail("a", KeyError("a")) == 3
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, KeyError) for result in results)
        assert engine.switches == []

    run(main())


def test_patience_is_checked():
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="patience"):
            AdapterScheduler(Engine().activate, patience=wrong)
