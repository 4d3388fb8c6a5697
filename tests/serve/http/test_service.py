# SPDX-License-Identifier: Apache-2.0
"""A server process that takes the place of another: adapters, names, what is lost, the journal."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress

import pytest

from shira.errors import AdapterError, ServeError, SwitchError
from shira.serve import journal
from shira.serve.http import routes
from shira.serve.http.service import AdapterService
from shira.serve.journal import Kept, Record

from .fakes import FakeEngine
from .test_turns import Site, lines

MIX = {"fr": 0.5, "de": -1.0}


class DurableSite(Site):
    """A site whose service keeps a journal; `restart` is what a new process does."""

    def __init__(self, folder, journal):
        super().__init__(folder, seconds=0)
        self.options["journal"] = journal

    async def restart(self):
        self.engine = self.server.engine = FakeEngine()
        self.service = AdapterService(self.engine, **self.options)
        return await self.service.restore()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def on_durable_site(test, folder, path=None):
    async def main():
        site = DurableSite(folder, path or folder.parent / "journal.json")
        await site.restart()
        for name, what in (("fr", "french"), ("de", "german")):
            assert (await site.own(routes.LOAD, name=name, path=what))[0] == 200
        assert (await site.own(routes.LOAD, name="mix", adapters=MIX))[0] == 200
        await test(site)

    asyncio.run(main())


async def answers(site):
    return {model: lines((await site.ask(model))[1])[0] for model in ("fr", "de", "mix", "base")}


def test_an_adapter_that_cannot_be_read_again(folder):
    """Told to those who ask for it, without where the folder is; the others have their answers."""

    async def test(site):
        path, activate = folder / "german", site.engine.activate

        async def gone(weights):
            if "de" in (weights or {}):
                raise AdapterError(f"adapter 'de' cannot be read again from {path}")
            await activate(weights)

        site.engine.activate = gone
        status, body = await site.ask("de")
        assert status == 400
        assert json.loads(body)["error"]["message"].endswith("cannot be read again from german")
        for model in ("fr", "base"):
            assert (await site.ask(model))[0] == 200

    on_durable_site(test, folder)


def test_no_error_tells_where_the_folder_is(folder):
    async def test(site):
        async def changed(weights):
            raise SwitchError(f"adapter 'de' cannot be read again from {folder}/german")

        site.engine.check = site.engine.activate = changed
        for status, body in (
            await site.ask("de"),
            await site.own(routes.LOAD, name="again", adapters={"de": 2}),
        ):
            assert status == 503
            assert "again from german" in str(body)
            assert str(folder) not in str(body)

    on_durable_site(test, folder)


def test_the_engine_is_told_which_adapters_requests_wait_for(folder):
    async def test(site):
        site.engine.seconds = 0.01
        waited, activate = [], site.engine.activate

        async def switch(weights):
            waited.append(site.engine.waiting())
            await activate(weights)

        site.engine.activate = switch
        await asyncio.gather(*(site.ask(name) for name in ("fr", "mix", "base")))
        assert waited[0] == {"fr", "de"}
        assert waited[-1] < waited[0]

    on_durable_site(test, folder)


@pytest.mark.parametrize("active", ["fr", "mix", None])
def test_a_restart_changes_nothing_that_is_served(folder, active):
    async def test(site):
        before = await answers(site)
        assert (await site.own(routes.ACTIVATE, name=active))[0] == 200
        listed = (await site.own(routes.LIST))[1]
        assert await site.restart() == {}
        again = (await site.own(routes.LIST))[1]
        assert again["data"] == listed["data"]
        assert again["active"] == listed["active"] == active
        assert site.engine.active == {"fr": {"fr": 1.0}, "mix": MIX, None: {}}[active]
        assert await answers(site) == before

    on_durable_site(test, folder)


def test_each_change_is_in_the_journal_before_it_is_answered(folder):
    def now():
        return journal.read(folder.parent / "journal.json")

    async def test(site):
        kept = {"fr": Kept("french", "french"), "de": Kept("german", "german")}
        assert now() == Record(kept, {"mix": MIX}, {})
        await site.own(routes.ACTIVATE, name="mix")
        assert now() == Record(kept, {"mix": MIX}, MIX)
        await site.own(routes.ACTIVATE, name=None)
        assert now().active == {}
        await site.own(routes.UNLOAD, name="mix")
        await site.own(routes.UNLOAD, name="de")
        assert now() == Record({"fr": kept["fr"]}, {}, {})

    on_durable_site(test, folder)


def test_a_switch_that_a_request_made_follows(folder):
    async def test(site):
        await asyncio.gather(*[site.ask(model) for model in ("fr", "de", "mix", "de")])
        await asyncio.gather(*site.service._tasks)
        active = journal.read(folder.parent / "journal.json").active
        assert active == site.engine.active != {}

    on_durable_site(test, folder)


def test_what_is_gone_or_changed_is_named_and_the_others_are_served(folder):
    async def test(site):
        await site.own(routes.ACTIVATE, name="de")
        (folder / "french" / "adapter").write_text("other")
        failed = await site.restart()
        assert set(failed) == {"fr", "mix"}
        assert "'french' has changed" in failed["fr"]
        assert "'fr' could not be restored" in failed["mix"]
        assert site.engine.active == {"de": 1.0}
        assert site.engine.held == {"de": "german"}
        assert (await site.own(routes.LIST))[1]["not_restored"] == failed
        status, data = await site.ask("fr")
        assert status == 404
        assert "could not be restored" in json.loads(data)["error"]["message"]
        for model, active in (("de", {"de": 1.0}), ("base", {})):
            assert lines((await site.ask(model))[1]) == [active, active]
        status, value = await site.own(routes.LOAD, name="new", adapters={"fr": 1})
        assert (status, "has changed" in value["error"]["message"]) == (404, True)

    on_durable_site(test, folder)


def test_what_is_lost_may_come_back_with_the_next_restart(folder):
    async def test(site):
        (folder / "french").rename(folder / "away")
        failed = await site.restart()
        assert "no adapter at 'french'" in failed["fr"]
        assert (await site.own(routes.LOAD, name="third", path="german"))[0] == 200
        (folder / "away").rename(folder / "french")
        assert await site.restart() == {}
        assert set(site.service.served) == {"fr", "de", "mix", "third"}

    on_durable_site(test, folder)


def test_what_is_lost_may_be_loaded_again_or_forgotten(folder):
    async def test(site):
        (folder / "french" / "adapter").write_text("other")
        await site.restart()
        assert (await site.own(routes.LOAD, name="fr", path="french"))[0] == 200
        assert (await site.own(routes.UNLOAD, name="mix"))[0] == 200
        for name in ("mix", ["mix"], {}, None):
            assert (await site.own(routes.UNLOAD, name=name))[0] == 404
        assert await site.restart() == {}
        assert site.engine.held == {"fr": "other", "de": "german"}

    on_durable_site(test, folder)


def test_a_journal_that_cannot_be_written(folder, monkeypatch):
    def full(path, record):
        raise OSError(28, "No space left on device")

    async def test(site):
        before = site.service.journal.read_bytes()
        monkeypatch.setattr(journal, "write", full)
        status, value = await site.own(routes.LOAD, name="third", path="german")
        assert status == 503
        assert "No space left" in value["error"]["message"]
        assert str(folder.parent) not in value["error"]["message"]
        assert "third" not in site.service.served
        assert "third" not in site.engine.held
        assert (await site.own(routes.ACTIVATE, name="fr"))[0] == 503
        assert lines((await site.ask("de"))[1])[0] == {"de": 1.0}  # requests go on
        await asyncio.gather(*site.service._tasks)
        monkeypatch.undo()
        assert site.service.journal.read_bytes() == before
        assert (await site.own(routes.LOAD, name="third", path="german"))[0] == 200
        assert set(journal.read(site.service.journal).adapters) == {"fr", "de", "third"}

    on_durable_site(test, folder)


GOOD = b'{"shira_journal": 1, "adapters": {}, "combinations": {}, "active": {}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        GOOD[:-9],
        GOOD[:-2] + b'"fr": NaN}}',
        GOOD[:-2] + b'"fr": 1e999}}',
        GOOD[:-2] + b'"fr": 1' + b"0" * 400 + b"}}",
        GOOD[:-2] + b'"\\ud800": 1}}',
        b"[" * 100_000,
        b"\xff\xfe",
        b" " * (16 * 2**20) + GOOD,
        "folder",
        "loop",
    ],
    ids=lambda content: repr(content[:20] + content[-20:]),
)
def test_a_journal_that_cannot_be_read_is_set_aside(folder, content, caplog):
    path = folder.parent / "journal.json"
    others = [path.with_name(f"journal.json.unreadable-{n}") for n in (1, 2)]
    for other in others:
        other.write_text("of before")
    if content == "folder":
        path.mkdir()
        (path / "inside").write_text("kept")
    elif content == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(content)

    async def main():
        site = DurableSite(folder, path)
        assert await site.restart() == {}
        said = (await site.own(routes.LIST))[1]
        assert json.loads(routes.encoded(said))["journal_set_aside"]["file"] == (
            "journal.json.unreadable-3"
        )
        assert str(folder.parent) not in said["journal_set_aside"]["why"]
        assert (await site.own(routes.LOAD, name="fr", path="french"))[0] == 200
        assert set(journal.read(path).adapters) == {"fr"}
        await site.restart()
        assert (await site.own(routes.LIST))[1]["journal_set_aside"] is None
        assert set(site.service.served) == {"fr"}

    asyncio.run(main())
    assert "journal.json.unreadable-3" in caplog.text
    aside = path.with_name("journal.json.unreadable-3")
    if content == "folder":
        assert (aside / "inside").read_text() == "kept"
    elif content == "loop":
        assert aside.is_symlink()
    else:
        assert aside.read_bytes() == content
    assert [other.read_text() for other in others] == ["of before"] * 2


def test_a_journal_that_may_not_be_read_is_set_aside(folder, monkeypatch):
    path = folder.parent / "journal.json"
    path.write_bytes(GOOD)

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    async def main():
        monkeypatch.setattr(journal, "read", denied)
        site = DurableSite(folder, path)
        await site.restart()
        assert "Permission denied" in site.service.set_aside["why"]

    asyncio.run(main())
    assert path.with_name("journal.json.unreadable-1").read_bytes() == GOOD


def test_a_linked_journal_is_set_aside_where_it_lies(folder):
    path, real = folder.parent / "journal.json", folder.parent / "real.json"
    real.write_text("{")
    path.symlink_to(real)
    asyncio.run(DurableSite(folder, path).restart())
    assert path.is_symlink()
    assert real.with_name("real.json.unreadable-1").read_text() == "{"
    assert journal.read(real) == Record()


def test_a_pipe_is_no_journal_and_stays(folder):
    path = folder.parent / "journal.json"
    os.mkfifo(path)
    with pytest.raises(ServeError, match="neither be read nor be set aside"):
        asyncio.run(DurableSite(folder, path).restart())
    assert path.is_fifo()


@pytest.mark.parametrize("scale", [b"NaN", b"1e999", b"1e300"])
def test_a_scale_that_is_none_never_reaches_the_journal(folder, scale):
    async def test(site):
        before = site.service.journal.read_bytes()
        body = b'{"name": "new", "adapters": {"fr": ' + scale + b"}}"
        assert (await site.own(routes.LOAD, body))[0] == 400
        assert site.service.journal.read_bytes() == before
        assert await site.restart() == {}
        assert set(site.service.served) == {"fr", "de", "mix"}

    on_durable_site(test, folder)


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (routes.LOAD, {"name": "third", "path": "german"}),
        (routes.LOAD, {"name": "third", "adapters": {"fr": 2}}),
        (routes.UNLOAD, {"name": "mix"}),
        (routes.ACTIVATE, {"name": "fr"}),
    ],
)
def test_a_request_that_is_cancelled_leaves_journal_and_engine_agreeing(
    folder, route, fields, monkeypatch
):
    """At each of its steps; what was begun is done, or was not begun."""

    async def test(site):
        load = site.engine.load

        async def slow(name, path):
            said = await load(name, path)
            for _ in range(5):  # the engine holds it, and has not said so yet
                await asyncio.sleep(0)
            return said

        monkeypatch.setattr(site.engine, "load", slow)
        for steps in range(0, 40):
            request = asyncio.ensure_future(site.own(route, **fields))
            for _ in range(steps):
                await asyncio.sleep(0)
            request.cancel()
            with suppress(asyncio.CancelledError):
                await request
            while site.service._tasks:
                await asyncio.gather(*site.service._tasks)
            kept = journal.read(site.service.journal)
            assert kept == site.service.record()
            assert set(kept.adapters) == set(site.engine.held)
            assert kept.active == site.engine.active
            for undo, what in (
                (routes.UNLOAD, {"name": "third"}),
                (routes.ACTIVATE, {"name": None}),
            ):
                await site.own(undo, **what)
            if "mix" not in site.service.served:
                await site.own(routes.LOAD, name="mix", adapters=MIX)

    on_durable_site(test, folder)


def test_a_server_without_a_folder_does_not_forget(folder):
    path = folder.parent / "journal.json"
    journal.write(path, Record({"fr": Kept("french", "french")}))
    site = DurableSite(folder, path)
    site.options["folder"] = None
    with pytest.raises(ServeError, match="no folder of adapters"):
        asyncio.run(site.restart())
    assert set(journal.read(path).adapters) == {"fr"}


def test_a_lost_name_does_not_hide_the_base(folder):
    path = folder.parent / "journal.json"
    journal.write(path, Record({"base": Kept("french", "french")}))

    async def main():
        site = DurableSite(folder, path)
        assert set(await site.restart()) == {"base"}
        assert lines((await site.ask("base"))[1])[0] == {}

    asyncio.run(main())
