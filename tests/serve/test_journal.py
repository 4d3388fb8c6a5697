# SPDX-License-Identifier: Apache-2.0
"""What an engine held, in a file and out of it again; files that are no journal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import AdapterError, FileFormatError
from shira.serve import journal
from shira.serve.journal import Kept, Record

RECORD = Record(
    {"french": Kept("fr/ançais", "0e57"), "german": Kept("german", "99")},
    {"mix": {"french": 0.1, "german": -1 / 3}},
    {"french": 0.1, "german": 1e-300},
)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "journal.json"
    assert journal.read(path) == Record()
    journal.write(path, RECORD)
    assert journal.read(path) == RECORD
    journal.write(path, Record())
    assert journal.read(path) == Record()
    assert list(tmp_path.iterdir()) == [path]


scales = st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=3)
records = st.builds(
    Record,
    st.dictionaries(st.text(), st.builds(Kept, st.text(), st.text()), max_size=3),
    st.dictionaries(st.text(), scales, max_size=3),
    scales,
)


@settings(deadline=None)
@given(records)
def test_any_record(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("any") / "journal.json"
    journal.write(path, record)
    assert journal.read(path) == record


def test_a_write_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "journal.json"
    journal.write(path, RECORD)

    def replace(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match="No space"):
        journal.write(path, Record())
    monkeypatch.undo()
    assert journal.read(path) == RECORD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", True])
@pytest.mark.parametrize("where", ["combinations", "active"])
def test_a_scale_that_is_none_is_not_written(tmp_path, scale, where):
    path = tmp_path / "journal.json"
    journal.write(path, RECORD)
    terms = {"a": scale} if where == "active" else {"mix": {"a": scale}}
    with pytest.raises(AdapterError, match="scale of 'a'"):
        journal.write(path, Record(**{where: terms}))
    assert journal.read(path) == RECORD


@pytest.mark.parametrize(
    "record",
    [
        Record({"a\ud800": Kept("a", "0")}),
        Record({"a": Kept("a\udcff", "0")}),
        Record(active={"a\ud800": 1.0}),
    ],
)
def test_a_name_that_is_no_text_is_not_written(tmp_path, record):
    with pytest.raises(AdapterError, match="no Unicode text"):
        journal.write(tmp_path / "journal.json", record)
    assert list(tmp_path.iterdir()) == []


def test_what_would_not_be_read_again_is_not_written(tmp_path):
    path = tmp_path / "journal.json"
    journal.write(path, RECORD)
    with pytest.raises(OSError, match="too large"):
        journal.write(path, Record({"a": Kept("x" * 2**24, "0")}))
    assert journal.read(path) == RECORD


GOOD = {"shira_journal": 1, "adapters": {}, "combinations": {}, "active": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"shira_journal": 2},
        {"adapters": None},
        {"adapters": {"a": "path"}},
        {"adapters": {"a": {"path": "a"}}},
        {"adapters": {"a": {"path": "a", "digest": 1}}},
        {"combinations": []},
        {"combinations": {"a": 1}},
        {"combinations": {"a": {"b": "much"}}},
        {"active": {"a": True}},
        {"active": None},
        {"active": {"a": 1e999}},
        {"active": {"a": 10**400}},
        {"active": {"a\ud800": 1}},
    ],
)
def test_what_is_no_journal(tmp_path, change):
    path = tmp_path / "journal.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(FileFormatError, match=r"journal\.json"):
        journal.read(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\x80\x04.", b'{"a": 1, "a": 2}'])
def test_what_is_no_json(tmp_path, raw):
    path = tmp_path / "journal.json"
    path.write_bytes(raw)
    with pytest.raises(FileFormatError):
        journal.read(path)
