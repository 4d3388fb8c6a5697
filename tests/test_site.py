# SPDX-License-Identifier: Apache-2.0
"""The site: its map of the paper names what exists, its pictures are those of the script."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest

from shira.masks import MASKS
from tests.pages import fences

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAPER = (DOCS / "paper.md").read_text()
NAMES = sorted(set(re.findall(r"`(shira(?:\.\w+)+)`", PAPER)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", PAPER)))


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_map_exist(name):
    first, *rest = name.split(".")
    found = importlib.import_module(first)
    for part in rest:
        found = getattr(found, part)


@pytest.mark.parametrize("test", TESTS)
def test_tests_of_the_map_exist(test):
    path, _, function = test.partition("::")
    assert (ROOT / path).is_file()
    assert not function or f"\ndef {function}(" in (ROOT / path).read_text()


def test_the_map_has_nothing_but_names_tests_and_benchmarks():
    from benchmarks.__main__ import SUITES

    found = [row for row in rows(PAPER) if row[-1] != "benchmark"]
    assert len(found) > 20
    for *_, functions, tests, benchmark in found:
        names, paths, suites = (re.findall("`([^`]+)`", c) for c in (functions, tests, benchmark))
        assert {name for name in names if name != "slot"} <= set(NAMES)
        assert set(paths) <= set(TESTS)
        assert set(suites) <= set(SUITES)
        assert names or functions == "-"
        assert paths or tests == "-"
        assert suites or benchmark in ("-", "not measured")


def test_every_mask_of_the_paper_is_in_the_map():
    of_the_paper = [spec for spec in MASKS.values() if spec.source[0] != "("]
    assert len(of_the_paper) >= 5
    for spec in of_the_paper:
        assert f"`shira.masks.{spec.select.__name__}`" in PAPER


def test_pictures_are_those_of_the_script(tmp_path):
    script = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    assert set(script["masks"]()) <= set(MASKS)
    assert {support.nnz for support in script["masks"]().values()} == {script["ENTRIES"]}
    script["main"](tmp_path)
    for drawn in tmp_path.glob("*.svg"):
        committed = (DOCS / "pictures" / drawn.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in committed:  # others draw text otherwise
            assert drawn.read_text() == committed
    assert len(list(tmp_path.glob("*.svg"))) == 2


def test_every_public_name_is_in_the_reference():
    import shira

    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: shira\.(\w+)$", pages, re.MULTILINE))
    modules = {"chain", "convert", "masks", "ops", "store"}
    pefts = {"PeftModel", "get_peft_model"}
    assert set(shira.__all__) - modules - pefts - {"ShiraError", "__version__"} <= listed
    assert "::: shira.errors" in pages


def test_every_command_and_option_is_in_the_reference():
    from shira.cli.app import COMMANDS

    page = runpy.run_path(str(DOCS / "hooks.py"))["command_line"]()
    assert re.findall(r"^## shira ([\w-]+)$", page, re.MULTILINE) == list(COMMANDS)
    assert "| `--density` | Share of the entries of each linear layer to train." in page
    assert "(default 42)" in page


def test_the_reference_is_the_same_when_built_on_a_terminal(monkeypatch):
    command_line = runpy.run_path(str(DOCS / "hooks.py"))["command_line"]
    plain = command_line()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert command_line() == plain
    assert "jq .pairs[0].jaccard" in plain


def test_lines_of_code_fit_the_page():
    for page in DOCS.glob("*.md"):
        for _, text in fences(page):
            for line in text.splitlines():
                assert len(line) <= 100, f"{page.name}: {line}"
