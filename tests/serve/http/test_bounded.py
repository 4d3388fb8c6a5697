# SPDX-License-Identifier: Apache-2.0
"""Requests over HTTP that bring adapters along under a bound on memory, in virtual time."""

from __future__ import annotations

import asyncio
import json

import pytest

from shira.serve.client import AsyncClient
from shira.serve.http import routes
from shira.serve.http.service import AdapterService
from shira.serve.http.turns import Turns, carrying

from ..test_riders import NAMES, ROOM, SIZE, AsyncLLM, Parameters
from ..virtual_time import run
from .fakes import post


class Site:
    """A server with a real client, on an engine of names: two of its four adapters fit."""

    def __init__(self, folder):
        self.folder, self.released = folder, asyncio.Event()
        self.app = Turns(self.answer, lambda: self.service, routes.OWN_PATHS)

    async def start(self, **options):
        engine = AsyncLLM()
        self.workers = engine.workers
        self.client = await AsyncClient.of(engine, max_adapter_memory=ROOM)
        await self.client.mix()
        self.riders = self.client._shared.riders
        options = {"folder": self.folder, "base_models": ["base"], "mixing": True, **options}
        self.service = AdapterService(self.client, **options)
        for name in (*NAMES, "odd"):
            (self.folder / name).mkdir(exist_ok=True)
            assert (await self.own(routes.LOAD, name=name, path=name))[0] == 200

    async def own(self, route, **fields):
        return await routes.answer(self.service, route, json.dumps(fields).encode())

    async def answer(self, scope, receive, send):
        """The server within: looks all the time that the adapters are in memory."""
        request = json.loads((await receive())["body"])
        own, parameters = carrying.get(), Parameters()
        if own is not None:
            _, parameters = own.by("x", parameters)
        gone = asyncio.ensure_future(receive())
        for _ in range(10):
            if own is not None:
                names = self.workers.run(parameters)
            else:
                names = "".join(self.workers.active)
            if request["seconds"] is None:
                await self.released.wait()
            else:
                await asyncio.wait({gone}, timeout=request["seconds"] / 10)
        gone.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": names.encode()})

    def ask(self, model, seconds=1.0, **options):
        value = {"model": model, "seconds": seconds}
        return asyncio.ensure_future(post(self.app, "/v1/completions", value, **options))


@pytest.fixture
def on_site(tmp_path):
    def begin(test):
        async def main():
            site = Site(tmp_path)
            await site.start()
            await test(site)
            await asyncio.sleep(100)
            assert not site.riders.on_board
            assert not site.riders.in_line
            assert site.service.scheduler.running == 0
            assert not any(site.service._running.values())

        run(main())

    return begin


def test_each_is_answered_by_its_own(on_site):
    async def test(site):
        assert site.workers.holding.nbytes <= ROOM
        assert (await site.own(routes.LOAD, name="mix", adapters={"a": 0.5, "c": 2}))[0] == 200
        models = ["a", "b", "base", "c", "mix", "d", "a", "b", "odd", "c", "base"]
        asked = [site.ask(model) for model in models]
        expected = [{"base": "", "mix": "ac"}.get(model, model) for model in models]
        answers = await asyncio.gather(*asked)
        assert [(status, data.decode()) for status, data in answers] == [
            (200, names) for names in expected
        ]
        wide = {"a": 1, "b": 1, "c": 1}
        status, told = await site.own(routes.LOAD, name="wide", adapters=wide)
        assert status == 400
        assert f"take {3 * SIZE} bytes in a worker" in told["error"]["message"]

    on_site(test)


def test_a_client_that_goes_away_while_it_waits_for_room(on_site):
    async def test(site):
        long = [site.ask("a", 50), site.ask("b", 50)]
        await asyncio.sleep(1)
        leaving = [site.ask(model, leaves=3) for model in "cdc"]
        await asyncio.sleep(1)
        assert sum(site.riders.in_line.values()) == 3
        last = site.ask("d")
        assert [await each for each in leaving] == [(None, b"")] * 3
        assert sorted(site.riders.in_line) == ["d"]
        assert not last.done()
        assert (await last)[1] == b"d"
        assert all([(await each)[0] == 200 for each in long])

    on_site(test)


def test_what_is_unloaded_ends_first_with_those_that_wait_for_room(on_site):
    async def test(site):
        asked = [site.ask("a", 5), site.ask("b", 5), site.ask("c", 5)]
        await asyncio.sleep(1)
        unloading = asyncio.ensure_future(site.own(routes.UNLOAD, name="c"))
        await asyncio.sleep(1)
        assert (await site.ask("c"))[0] == 404
        assert (await unloading)[0] == 200
        assert [(await each)[1] for each in asked] == [b"a", b"b", b"c"]
        assert not site.client._shared.why_not.keys() & {(("c", 1.0),)}

    on_site(test)


def test_an_adapter_whose_file_is_gone_is_told_to_those_who_ask_for_it(on_site):
    async def test(site):
        site.workers.gone.add("a")
        (wrong, told), (right, data) = await asyncio.gather(site.ask("a"), site.ask("b"))
        assert (wrong, right, data) == (400, 200, b"b")
        assert json.loads(told)["error"]["message"] == "its file is gone"

    on_site(test)


def test_adapters_are_registered_while_all_memory_is_in_use(on_site):
    """One by itself at once; several together when they can be looked at together."""

    async def test(site):
        asked = [site.ask("a", None), site.ask("b", None)]
        await asyncio.sleep(1)
        (site.folder / "e").mkdir()
        status, said = await site.own(routes.LOAD, name="e", path="e")
        assert (status, said["rides"]) == (200, True)
        assert not any(each.done() for each in asked)
        mix = asyncio.ensure_future(site.own(routes.LOAD, name="mix", adapters={"e": 1, "c": 1}))
        await asyncio.sleep(1)
        assert not mix.done()
        site.released.set()
        status, said = await mix
        assert (status, said["rides"]) == (200, True)
        assert all([(await each)[0] == 200 for each in asked])
        assert (await site.ask("mix"))[1] == b"ec"

    on_site(test)
