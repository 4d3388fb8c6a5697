# SPDX-License-Identifier: Apache-2.0
"""Requests through `Turns` and the service's own routes, on a fake engine in virtual time."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from shira.errors import ServeError
from shira.serve.http import routes, turns
from shira.serve.http.service import AdapterService
from shira.serve.http.turns import Turns, answering

from ..virtual_time import run
from .fakes import FakeEngine, FakeServer, MixingEngine, post

CHAT = "/v1/chat/completions"


class Site:
    """A server with adapters fr and de, and the routes."""

    def __init__(self, tmp_path, seconds=0.1, **options):
        for name in ("french", "german", "damaged"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "adapter").write_text(name)
        self.engine = FakeEngine(seconds)
        self.server = FakeServer(self.engine)
        self.service = None
        self.options = {"folder": tmp_path, "base_models": ["base", "alias"], **options}
        self.app = Turns(self.server, lambda: self.service, routes.OWN_PATHS)

    async def start(self):
        self.service = AdapterService(self.engine, **self.options)
        for name, path in (("fr", "french"), ("de", "german")):
            assert (await self.own(routes.LOAD, name=name, path=path))[0] == 200

    async def own(self, route, data=None, **fields):
        data = json.dumps(fields).encode() if data is None else data
        return await routes.answer(self.service, route, data)

    async def ask(self, model, path=CHAT, **fields):
        status, data = await post(self.app, path, {"model": model, **fields})
        return status, data


def on_site(test, tmp_path, **options):
    site = Site(tmp_path, **options)

    async def main():
        await site.start()
        await test(site)
        await asyncio.sleep(10)
        if site.service is not None:
            assert site.service.scheduler.running == 0
            assert site.service.scheduler.waiting == {}
        assert site.engine.running == 0

    run(main())


def lines(data):
    return [json.loads(line) for line in data.splitlines()]


def test_each_request_is_answered_by_the_adapter_it_names(tmp_path):
    async def test(site):
        wanted = ["fr", "base", "de", "fr", "alias", None, "", "de"] * 10
        answers = await asyncio.gather(
            *(site.ask(model, seconds=i % 3 / 10) for i, model in enumerate(wanted))
        )
        for model, (status, data) in zip(wanted, answers, strict=True):
            assert status == 200
            active = {model: 1.0} if model in ("fr", "de") else {}
            assert lines(data) == [active, active]  # from its first piece to its last
        assert all(r["model"] in ("base", "alias", None, "") for r in site.server.requests)
        assert site.service.scheduler.switches < 10

    on_site(test, tmp_path)


def test_the_body_arrives_as_it_was_but_for_the_model(tmp_path):
    async def test(site):
        fields = {"messages": [{"content": "é\ud800"}], "n": 10**20, "t": 0.1}
        await site.ask("fr", **fields)
        await post(site.app, CHAT, {"model": "base", **fields}, parts=3)
        assert site.server.requests == [{"path": CHAT, "model": "base", **fields}] * 2

    on_site(test, tmp_path)


def test_an_unknown_model_is_refused_at_once_and_causes_no_switch(tmp_path):
    async def test(site):
        await site.ask("fr")
        for model in ("frr", "../fr", ["fr"], {"a": 1}, 3):
            status, data = await site.ask(model)
            error = json.loads(data)["error"]
            assert (status, error["code"], error["type"]) == (404, 404, "NotFoundError")
        assert "Did you mean 'fr'" in json.loads((await site.ask("frr"))[1])["error"]["message"]
        assert site.engine.active == {"fr": 1.0}
        assert len(site.server.requests) == 1

    on_site(test, tmp_path)


def test_what_else_the_server_serves_runs_on_the_base(tmp_path):
    async def test(site):
        await site.ask("fr")
        status, data = await site.ask("a-lora")
        assert (status, lines(data)) == (200, [{}, {}])
        assert site.server.requests[-1]["model"] == "a-lora"
        assert (await site.own(routes.LOAD, name="a-lora", path="french"))[0] == 409

    on_site(test, tmp_path, taken=lambda name: name == "a-lora")


def test_any_post_takes_part_but_those_that_run_no_model(tmp_path):
    async def test(site):
        await site.ask("fr")
        for path in ("/v1/embeddings", "/some/new/route", "/v1/completions/"):
            await site.ask("de", path=path)
            assert site.engine.active == {"de": 1.0}
            await site.ask("fr")
        switches = site.service.scheduler.switches
        for path in ("/tokenize", "/v1/chat/completions/render", "/v1/messages/count_tokens"):
            assert (await site.ask("de", path=path))[0] == 200
            assert site.server.requests[-1]["model"] == "base"
        await site.ask("de", path="/pause")
        await post(site.app, CHAT, {"model": "de"}, method="GET")
        assert site.service.scheduler.switches == switches

    on_site(test, tmp_path)


@pytest.mark.parametrize("background", [True, 1, "true"])
def test_what_would_outlast_its_turn_is_refused(tmp_path, background):
    async def test(site):
        for model in ("fr", "base"):
            status, data = await site.ask(model, path="/v1/responses", background=background)
            assert status == 400
            assert "background" in json.loads(data)["error"]["message"]
        assert (await site.ask("fr", path="/v1/responses", background=False))[0] == 200

    on_site(test, tmp_path)


def test_websockets_are_closed(tmp_path):
    async def test(site):
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await site.app({"type": "websocket", "path": "/v1/realtime"}, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1008, "reason": "not with adapters"}]

    on_site(test, tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"fr"', b"\xff\xfe"])
def test_what_is_no_json_object_goes_to_the_base(tmp_path, data):
    async def test(site):
        site.app.app = echo
        await site.own(routes.ACTIVATE, name="fr")
        status, answer = await post(site.app, CHAT, data)
        assert (status, answer) == (200, data)
        assert site.engine.active == {}

    async def echo(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    on_site(test, tmp_path)


def test_a_body_that_is_too_large(tmp_path, monkeypatch):
    async def test(site):
        monkeypatch.setattr(site.app, "body_limit", 100)
        status, data = await site.ask("fr", pad="x" * 100)
        assert (status, json.loads(data)["error"]["code"]) == (413, 413)
        assert site.server.requests == []

    on_site(test, tmp_path)


@pytest.mark.parametrize("path", [CHAT, "/tokenize", *sorted(routes.OWN_PATHS)])
@pytest.mark.parametrize("declared", [b"20000000", b"9" * 5000, None])
def test_a_large_body_is_refused_before_it_is_there(tmp_path, path, declared):
    """Neither read to the end nor parsed, whatever length it says that it has."""
    read, sent = [], []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b" " * 2**20, "more_body": True}

    async def send(message):
        sent.append(message)

    async def test(site):
        headers = [] if declared is None else [(b"content-length", declared)]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await site.app(scope, receive, send)
        assert sent[0]["status"] == 413
        assert json.loads(sent[1]["body"])["error"]["code"] == 413
        assert len(read) <= (0 if declared else 17)
        assert site.server.requests == []

    on_site(test, tmp_path)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "fr", "x": [' + b"0," * 2**19 + b"0]}", 413),
        (b'{"model": "fr", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"model": "fr", "x": ' + b'{"a":' * 50_000, 400),
    ],
)
def test_bodies_that_take_long_to_parse(tmp_path, body, status):
    async def test(site):
        got, data = await post(site.app, CHAT, body)
        assert (got, json.loads(data)["error"]["code"]) == (status, status)
        assert site.server.requests == []

    on_site(test, tmp_path)


def test_a_body_that_is_not_small_is_parsed_beside_the_event_loop(tmp_path, monkeypatch):
    threads = []
    parse = turns._parsed

    def parsed(data):
        threads.append(threading.current_thread())
        return parse(data)

    async def test(site):
        monkeypatch.setattr(turns, "_parsed", parsed)
        fields = {"pad": "x" * 100_000}
        assert lines((await site.ask("fr", **fields))[1]) == [{"fr": 1.0}] * 2
        assert site.server.requests[-1] == {"path": CHAT, "model": "base", **fields}
        await site.ask("fr")
        assert [thread is threading.main_thread() for thread in threads] == [False, True]

    on_site(test, tmp_path)


@pytest.mark.parametrize("model", ["\ud800", "x" * 10**6, "a\0b", "\x1b[2J"])
def test_an_error_can_be_sent_whatever_was_asked(tmp_path, model):
    async def test(site):
        status, data = await site.ask(model)
        assert status == 404
        message = json.loads(data)["error"]["message"]
        assert len(message.encode()) < 5000

    on_site(test, tmp_path)


def test_clients_that_go_away(tmp_path):
    """While they wait: no switch for them. While they are answered: the server hears of it."""

    async def test(site):
        body = {"model": "de", "seconds": 1.0}
        waiting = asyncio.ensure_future(post(site.app, CHAT, body, leaves=0.3))
        running = asyncio.ensure_future(post(site.app, CHAT, {**body, "model": "fr"}, leaves=0.5))
        results = await asyncio.gather(running, waiting)
        assert results == [(None, b"")] * 2
        assert site.engine.running == 0
        left = asyncio.ensure_future(site.ask("fr", seconds=1.0))
        await asyncio.sleep(0.1)
        switches = site.service.scheduler.switches
        assert await post(site.app, CHAT, {"model": "de"}, leaves=0.2) == (None, b"")
        await left
        await asyncio.sleep(1)
        assert site.service.scheduler.switches == switches

    on_site(test, tmp_path)


def test_an_engine_that_cannot_switch(tmp_path):
    async def test(site):
        await site.ask("fr")
        site.engine.broken = True
        status, data = await site.ask("de")
        assert (status, json.loads(data)["error"]["type"]) == (503, "ServiceUnavailableError")
        assert "died" in json.loads(data)["error"]["message"]
        assert lines((await site.ask("fr"))[1]) == [{"fr": 1.0}] * 2  # goes on as it was
        site.engine.broken = False
        assert lines((await site.ask("de"))[1]) == [{"de": 1.0}] * 2

    on_site(test, tmp_path)


def test_before_the_engine_is_there(tmp_path):
    async def test(site):
        service, site.service = site.service, None
        assert (await site.ask("fr"))[0] == 503
        for path in (*routes.OWN_PATHS, routes.LIST):
            assert (await site.own(path, name="fr"))[0] == 503
        site.service = service

    on_site(test, tmp_path)


def test_the_application_knows_who_answers(tmp_path):
    async def test(site):
        seen = []

        async def app(scope, receive, send):
            await receive()
            seen.append(answering.get())
            raise RuntimeError("a defect of the application")

        site.app.app = app
        for model in ("fr", "base"):
            with pytest.raises(RuntimeError, match="defect"):
                await site.ask(model)
        assert seen == ["fr", None]
        assert answering.get() is None

    on_site(test, tmp_path)


def on_mixing_site(test, tmp_path):
    async def begin(site):
        for name in ("fr", "de"):
            assert (await site.own(routes.UNLOAD, name=name))[0] == 200
        site.engine = site.server.engine = MixingEngine(0.1)
        site.service = AdapterService(site.engine, mixing=True, **site.options)
        for name, path in (("fr", "french"), ("de", "german"), ("two", "damned")):
            (tmp_path / path).mkdir(exist_ok=True)
            (tmp_path / path / "adapter").write_text(path)
            assert (await site.own(routes.LOAD, name=name, path=path))[0] == 200
        await test(site)

    on_site(begin, tmp_path)


def test_adapters_that_ride_wait_for_nobody(tmp_path):
    async def test(site):
        now = asyncio.get_running_loop().time
        began = now()
        wanted = ["fr", "base", "two", "fr"] * 4
        answers = await asyncio.gather(*(site.ask(model, seconds=1) for model in wanted))
        assert now() - began < 3.1
        for model, (status, data) in zip(wanted, answers, strict=True):
            assert status == 200
            (said,) = set(data.splitlines())
            assert list(json.loads(said)) == ([] if model == "base" else [model])
        listed = {each["id"]: each for each in site.service.list()["data"]}
        assert [listed[name]["rides"] for name in ("fr", "de", "two")] == [True, False, True]
        assert listed["de"]["why_not"] == "it is odd"
        assert site.service.list()["riding"] == {}
        assert (await site.own(routes.ACTIVATE, name="fr"))[1]["switch_seconds"] is None
        assert site.service.scheduler.switches == 0

    on_mixing_site(test, tmp_path)


def test_one_that_cannot_ride_takes_turns_with_those_that_do(tmp_path):
    async def test(site):
        wanted = ["fr", "de", "two", "base", "de", "fr"] * 5
        answers = await asyncio.gather(*(site.ask(model, seconds=0.1) for model in wanted))
        for model, (_, data) in zip(wanted, answers, strict=True):
            (said,) = set(data.splitlines())
            assert list(json.loads(said)) == ([] if model == "base" else [model])
        assert 0 < site.service.scheduler.switches < 6

    on_mixing_site(test, tmp_path)


def test_a_name_of_which_it_is_not_known_whether_it_rides_is_free_again(tmp_path):
    async def test(site):
        assert (await site.own(routes.UNLOAD, name="fr"))[0] == 200
        why_not = site.engine.why_not

        async def broken(weights):
            raise ServeError("not now")

        site.engine.why_not = broken
        assert (await site.own(routes.LOAD, name="fr", path="french"))[0] == 503
        assert "fr" not in site.engine.held
        site.engine.why_not = why_not
        assert (await site.own(routes.LOAD, name="fr", path="french"))[0] == 200

    on_mixing_site(test, tmp_path)


def test_unloading_waits_for_the_requests_of_that_adapter_alone(tmp_path):
    async def test(site):
        now, began = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
        assert (await site.own(routes.LOAD, name="mix", adapters={"fr": 0.5, "two": 2}))[0] == 200
        long = asyncio.ensure_future(site.ask("fr", seconds=50))
        short = asyncio.ensure_future(site.ask("two", seconds=1))
        await asyncio.sleep(0.5)
        assert (await site.own(routes.UNLOAD, name="two"))[0] == 409  # part of mix
        assert (await site.own(routes.UNLOAD, name="mix"))[0] == 200
        unload = asyncio.ensure_future(site.own(routes.UNLOAD, name="two"))
        await asyncio.sleep(0.1)
        assert (await site.ask("two"))[0] == 404
        assert not unload.done()
        assert (await unload)[0] == 200
        assert short.done()
        assert now() - began < 10
        site.engine.held.pop("fr")  # an engine that fails
        gone = asyncio.ensure_future(site.own(routes.UNLOAD, name="fr"))
        await long
        assert (await gone)[0] == 500
        assert "fr" in site.service.served

    on_mixing_site(test, tmp_path)
