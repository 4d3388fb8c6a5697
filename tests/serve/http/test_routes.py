# SPDX-License-Identifier: Apache-2.0
"""Load, unload, activate, list: what they do, and the status of everything that goes wrong."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.serve.http import routes

from .fakes import post
from .test_turns import lines, on_site


def test_load_and_list(tmp_path):
    async def test(site):
        listed = (await site.own(routes.LIST))[1]
        assert [card["id"] for card in listed["data"]] == ["fr", "de"]
        assert listed["data"][0] == {
            "id": "fr",
            "object": "adapter",
            "parent": "base",
            "path": "french",
            "adapters": None,
            "digest": "french",
            "nnz": 6,
            "parameters": 1,
        }
        assert listed["active"] is None
        assert json.dumps(listed)
        assert site.engine.calls[0] == ("load", "fr", str(tmp_path / "french"))

    on_site(test, tmp_path)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "es", "path": "spanish"}, 404),
        ({"name": "es", "path": "../french"}, 403),
        ({"name": "es", "path": "/etc"}, 403),
        ({"name": "es", "path": 7}, 400),
        ({"name": "es", "path": "fr\ud800"}, 400),
        ({"name": "es", "path": "fr\0"}, 400),
        ({"name": "es", "path": "x" * 60_000}, 400),
        ({"name": "es\ud800", "path": "french"}, 400),
        ({"name": "x" * 60_000, "path": "french"}, 400),
        ({"\ud800": 1, "name": "es"}, 400),
        ({"name": "es", "path": "french", "pad": "x" * 70_000}, 413),
        ({"name": "es", "path": "damaged"}, 400),
        ({"name": "fr", "path": "french"}, 409),
        ({"name": "base", "path": "french"}, 409),
        ({"name": "alias", "path": "french"}, 409),
        ({"name": "e s", "path": "french"}, 400),
        ({"name": None, "path": "french"}, 400),
        ({"name": "es"}, 400),
        ({"path": "french"}, 400),
        ({"name": "es", "path": "french", "adapters": {"fr": 1}}, 400),
        ({"name": "es", "pth": "french"}, 400),
        ({"name": "es", "adapters": {}}, 400),
        ({"name": "es", "adapters": ["fr"]}, 400),
        ({"name": "es", "adapters": {"it": 1}}, 404),
        ({"name": "es", "adapters": {"fr": "much"}}, 400),
        ({"name": "es", "adapters": {"fr": True}}, 400),
        ({"name": "es", "adapters": {"fr": None}}, 400),
        ({"name": "es", "adapters": {"fr": [1]}}, 400),
        ({"name": "es", "adapters": {"fr": float("nan")}}, 400),
        ({"name": "es", "adapters": {"fr": float("-inf")}}, 400),
        ({"name": "es", "adapters": {"fr": 10**400}}, 400),
        ({"name": "es", "adapters": {"fr": 1e300}}, 400),
        ({"name": "es", "adapters": {"fr\ud800": 1}}, 400),
        ([], 400),
        ("fr", 400),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path, body, status):
    async def test(site):
        before = (await site.own(routes.LIST))[1]
        got, value = await site.own(routes.LOAD, json.dumps(body).encode())
        json.loads(routes.encoded(value))
        error = value["error"]
        error["message"].encode()
        assert (got, error["code"]) == (status, status)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert str(tmp_path) not in error["message"]
        assert (await site.own(routes.LIST))[1] == before
        assert set(site.engine.held) == {"fr", "de"}

    on_site(test, tmp_path)


@pytest.mark.parametrize("path", sorted(routes.OWN_PATHS))
@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"\x80\x04.", b"{" * 60_000, b'{"name": 1e999, "a": NaN}']
)
def test_bodies_that_are_no_json_object(tmp_path, path, data):
    async def test(site):
        status, value = await site.own(path, data)
        assert (status, value["error"]["type"]) == (400, "BadRequestError")

    on_site(test, tmp_path)


@pytest.mark.parametrize(
    "scale", [b"NaN", b"1e999", b"-1e999", b"Infinity", b"9" * 5000, b'1, "fr": 2', b'"\\ud800"']
)
def test_a_scale_that_is_none_is_a_400_and_is_not_kept(tmp_path, scale):
    async def test(site):
        body = b'{"name": "mix", "adapters": {"fr": ' + scale + b"}}"
        status, value = await site.own(routes.LOAD, body)
        assert (status, value["error"]["code"]) == (400, 400)
        routes.encoded(value)
        routes.encoded((await site.own(routes.LIST))[1])
        assert "mix" not in site.service.served

    on_site(test, tmp_path)


TEXTS = st.one_of(
    st.sampled_from(["fr", "de", "mix", "french", "german", "damaged", "../x", "base", ""]),
    st.text(st.characters(), max_size=20),
    st.text(st.characters(categories=["Cs", "Cc"]), max_size=5),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
BODIES = st.dictionaries(
    st.one_of(st.sampled_from(["name", "path", "adapters"]), TEXTS),
    st.one_of(VALUES, st.dictionaries(TEXTS, st.one_of(st.floats(), st.integers()), max_size=3)),
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from(sorted(routes.OWN_PATHS)), BODIES), max_size=6))
def test_any_body_has_an_answer_that_can_be_sent(tmp_path_factory, requests):
    """No 500, whatever the fields hold; what is told of the state can always be sent."""

    async def test(site):
        for path, body in requests:
            status, value = await site.own(path, json.dumps(body).encode())
            assert status in (200, 400, 403, 404, 409), value
            for told in (value, (await site.own(routes.LIST))[1]):
                json.loads(routes.encoded(told), parse_constant=pytest.fail)
            for served in site.service.served.values():
                assert all(math.isfinite(scale) for scale in served.weights.values())

    on_site(test, tmp_path_factory.mktemp("any"))


def test_a_server_without_a_folder_loads_nothing(tmp_path):
    async def test(site):
        site.service.folder = None
        status, value = await site.own(routes.LOAD, name="es", path="french")
        assert (status, "folder" in value["error"]["message"]) == (503, True)

    on_site(test, tmp_path)


def test_activate(tmp_path):
    async def test(site):
        status, value = await site.own(routes.ACTIVATE, name="fr")
        assert (status, value["active"]) == (200, "fr")
        assert value["switch_seconds"] is not None
        assert site.engine.active == {"fr": 1.0}
        again = (await site.own(routes.ACTIVATE, name="fr"))[1]
        assert again["switch_seconds"] is None
        for base in ("base", None):
            assert (await site.own(routes.ACTIVATE, name=base))[1]["active"] is None
        assert site.engine.active == {}
        assert (await site.own(routes.ACTIVATE, name="it"))[0] == 404

    on_site(test, tmp_path)


def test_several_adapters_under_one_name(tmp_path):
    async def test(site):
        status, card = await site.own(routes.LOAD, name="mix", adapters={"fr": 0.5, "de": -2})
        assert (status, card["adapters"], card["path"]) == (200, {"fr": 0.5, "de": -2.0}, None)
        assert lines((await site.ask("mix"))[1]) == [{"fr": 0.5, "de": -2.0}] * 2
        assert (await site.own(routes.LOAD, name="more", adapters={"mix": 1}))[0] == 400
        status, value = await site.own(routes.UNLOAD, name="fr")
        assert (status, "mix" in value["error"]["message"]) == (409, True)
        assert (await site.own(routes.UNLOAD, name="mix"))[0] == 200
        assert (await site.own(routes.UNLOAD, name="fr"))[0] == 200
        assert site.engine.held.keys() == {"de"}

    on_site(test, tmp_path)


def test_unload_lets_running_requests_end_and_refuses_queued_ones(tmp_path):
    async def test(site):
        running = asyncio.ensure_future(site.ask("fr", seconds=1.0))
        await asyncio.sleep(0.5)
        unloading = asyncio.ensure_future(site.own(routes.UNLOAD, name="fr"))
        await asyncio.sleep(0.5)
        queued = asyncio.ensure_future(site.ask("fr"))
        other = asyncio.ensure_future(site.ask("de"))
        status, data = await running
        assert (status, lines(data)) == (200, [{"fr": 1.0}] * 2)
        assert (await unloading)[0] == 200
        status, data = await queued
        assert (status, "unloaded" in json.loads(data)["error"]["message"]) == (404, True)
        assert lines((await other)[1]) == [{"de": 1.0}] * 2
        assert site.engine.held.keys() == {"de"}
        assert (await site.ask("fr"))[0] == 404
        assert (await site.own(routes.UNLOAD, name="fr"))[0] == 404
        assert (await site.own(routes.LOAD, name="fr", path="german"))[0] == 200
        assert lines((await site.ask("fr"))[1]) == [{"fr": 1.0}] * 2

    on_site(test, tmp_path)


def test_two_loads_of_one_name_at_once(tmp_path):
    async def test(site):
        both = [site.own(routes.LOAD, name="es", path=path) for path in ("french", "german")]
        assert sorted(status for status, _ in await asyncio.gather(*both)) == [200, 409]
        assert sum(call[0] == "load" for call in site.engine.calls) == 3

    on_site(test, tmp_path)


def test_own_routes_wait_for_no_turn(tmp_path):
    async def test(site):
        running = asyncio.ensure_future(site.ask("fr", seconds=1.0))
        await asyncio.sleep(0.5)
        waiting = asyncio.ensure_future(site.ask("de"))
        await asyncio.sleep(0.1)
        assert (await post(site.app, routes.LOAD, {"name": "x"}))[0] == 200  # reached the server
        listed = (await site.own(routes.LIST))[1]
        assert (listed["active"], listed["running"], listed["waiting"]) == ("fr", 1, {"de": 1})
        await asyncio.gather(running, waiting)

    on_site(test, tmp_path)


def test_defects_are_told_without_their_inside():
    status, value = routes.describe(RuntimeError("/home/secret"))
    assert status == 500
    assert "secret" not in value["error"]["message"]
