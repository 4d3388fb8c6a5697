# SPDX-License-Identifier: Apache-2.0
"""The committed table: all classes, none of them wrong; and the page of the docs is made of it."""

from __future__ import annotations

import pytest

from tests.sweep import one, table

ROWS = table.read()


def test_nothing_is_wrong():
    assert not [row["class"] for row in ROWS if row["verdict"] == "WRONG"]
    assert {row["verdict"] for row in ROWS} <= set(table.VERDICTS)
    built = [row for row in ROWS if row["verdict"] == "right"]
    assert len(built) > 300
    assert all(int(row["layers"]) for row in built)


def test_the_page_is_made_of_the_table():
    assert table.PAGE.read_text() == table.page(ROWS)


@pytest.mark.parametrize("name", ["transformers", "diffusers", "timm"])
def test_every_class_is_in_the_table(name):
    pytest.importorskip(name)
    listed = {row["library"]: set() for row in ROWS}
    for row in ROWS:
        listed[row["library"]].add(row["class"])
    library = one.library(name)
    if f"{name} {library.VERSION}" not in listed:
        pytest.skip("the table was made with another version")
    assert listed[f"{name} {library.VERSION}"] == set(library.names())


def test_a_row_for_each_class_and_the_last_result_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "TABLE", tmp_path / "results.csv")
    monkeypatch.setattr(table, "PAGE", tmp_path / "sweep.md")
    file = tmp_path / "one.jsonl"
    row = '{"library": "one 1.0", "class": "A", "layers": %d, "verdict": "%s", "detail": "a | b"}\n'
    file.write_text(row % (0, "WRONG") + row % (3, "right"))
    table.write([file], lambda library: ["A", "B"])
    found = [(r["class"], r["verdict"], r["layers"]) for r in table.read()]
    assert found == [("A", "right", "3"), ("B", "not run", "0")]
    page = table.PAGE.read_text()
    assert "| one 1.0 | 1 | 0 | 0 | 1 | 0 |" in page
    assert "| A | right | 3 | a \\| b |" in page
