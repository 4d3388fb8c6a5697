# SPDX-License-Identifier: Apache-2.0
"""`Client.restore` and `AsyncClient.restore`: a new engine gets what the one before it held."""

from __future__ import annotations

import asyncio

import pytest

from shira.errors import AdapterError, RestoreError, ServeError
from shira.serve import journal
from shira.serve.client import AsyncClient, Client
from shira.serve.journal import ACTIVE, Kept, Record

from .test_client import AsyncEngine, Engine

BOTH = {"a": 0.5, "b": 2.0}


class Sync:
    """The client of an ``LLM``, a step at a time."""

    def __init__(self):
        self.engine = Engine()
        self.ranks = self.engine.ranks
        self.client = Client(self.engine)

    def do(self, method, *args):
        return getattr(self.client, method)(*args)


class Async:
    """That of an ``AsyncLLM``."""

    def __init__(self):
        self.engine = AsyncEngine()
        self.ranks = self.engine.engine.ranks
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(AsyncClient.of(self.engine))

    def do(self, method, *args):
        return self.loop.run_until_complete(getattr(self.client, method)(*args))

    def __del__(self):
        self.loop.close()


@pytest.fixture(params=[Sync, Async])
def make(request):
    return request.param


@pytest.fixture
def record(make):
    """Of an engine that died."""
    lost = make()
    for name in "abc":
        lost.do("load", name, f"/adapters/{name}")
    lost.do("unload", "c")
    lost.do("activate", BOTH)
    lost.ranks.fail["shira_activate"] = RuntimeError("EngineDeadError")
    with pytest.raises(ServeError):
        lost.do("activate", None)
    return lost.client.record


def test_the_record_is_what_was_loaded_and_active(record):
    assert record == Record(
        {name: Kept(f"/adapters/{name}", f"digest of /adapters/{name}") for name in "ab"},
        {},
        BOTH,
    )


def test_a_new_engine_gets_it(make, record):
    new = make()
    new.do("restore", record)
    assert new.ranks.adapters == {name: f"/adapters/{name}" for name in "ab"}
    assert new.ranks.active == new.client.active == BOTH
    assert new.client.record == record


def test_through_a_file(make, record, tmp_path):
    journal.write(tmp_path / "journal.json", record)
    new = make()
    new.do("restore", journal.read(tmp_path / "journal.json"))
    assert new.client.record == record


def test_combinations_of_a_server_are_its_own(make, record):
    new = make()
    new.do("restore", Record(record.adapters, {"mix": BOTH}, record.active))
    assert new.client.record == record


def test_an_adapter_that_has_changed_is_left_out_and_named(make, record):
    new = make()
    new.ranks.files["/adapters/a"] = "other"
    with pytest.raises(RestoreError, match="'/adapters/a' has changed") as caught:
        new.do("restore", record)
    assert set(caught.value.failed) == {"a", ACTIVE}
    assert isinstance(caught.value.failed["a"], AdapterError)
    assert new.ranks.adapters == {"b": "/adapters/b"}
    assert new.ranks.active == {}
    assert set(new.client.record.adapters) == {"b"}


@pytest.mark.parametrize("error", [FileNotFoundError, AdapterError, OSError])
def test_an_adapter_that_is_gone_is_left_out_and_named(make, record, error):
    """An OSError of a worker comes as a ServeError, and is the adapter's as the engine lives."""
    new = make()
    new.ranks.files["/adapters/b"] = error
    with pytest.raises(RestoreError, match=r"b: .*/adapters/b") as caught:
        new.do("restore", Record(record.adapters, {}, {"a": 1.0}))
    assert set(caught.value.failed) == {"b"}
    assert new.ranks.active == {"a": 1.0}


def test_an_engine_that_is_lost_meanwhile(make, record):
    new = make()
    new.ranks.fail["shira_load"] = RuntimeError("EngineDeadError")
    new.ranks.fail["shira_begin_load"] = RuntimeError("EngineDeadError")
    new.ranks.fail["shira_activate"] = RuntimeError("EngineDeadError")
    with pytest.raises(ServeError, match="started again") as caught:
        new.do("restore", record)
    assert not isinstance(caught.value, RestoreError)


def test_what_was_active_cannot_be(make, record):
    new = make()
    new.ranks.fail["shira_activate"] = "AdapterError"
    with pytest.raises(RestoreError) as caught:
        new.do("restore", record)
    assert set(caught.value.failed) == {ACTIVE}
    assert set(new.ranks.adapters) == {"a", "b"}
