# SPDX-License-Identifier: Apache-2.0
"""The page of results: made of the files that are there, and of nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import page, report
from benchmarks.__main__ import SUITES
from benchmarks.panels import PANELS, Bar


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return page.files()


def test_every_suite_has_a_section_and_a_row_of_panels(made):
    text = made[page.PAGE].decode()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(SUITES)
    assert set(PANELS) == set(SUITES)


def test_what_has_a_file_has_tables_and_a_picture_and_the_rest_is_not_measured(made):
    text = made[page.PAGE].decode()
    for section in text.split("\n## ")[1:]:
        name = section.partition("\n")[0]
        if (report.RESULTS / f"{name}.json").exists():
            assert f"](benchmarks/{name}.svg)" in section
            assert "\n| --- | --: |" in section
            assert ElementTree.fromstring(made[f"benchmarks/{name}.svg"]).tag.endswith("svg")
        else:
            assert "Not measured." in section
            assert f"benchmarks/{name}.svg" not in made


def test_figures_are_those_of_the_files(tmp_path):
    result = json.loads((report.RESULTS / "switching.json").read_text())
    shira = result["results"]["layer"]["there_and_back"]["shira"]
    shira.update(median=0.123456, q1=0.1, q3=0.2)
    (tmp_path / "switching.json").write_text(json.dumps(result))
    made = page.files(tmp_path)
    assert set(made) == {page.PAGE, "benchmarks/switching.svg"}
    assert "123.4" in made[page.PAGE].decode()
    (panel,) = PANELS["switching"](result)
    assert panel.bars is not None
    assert panel.bars["shira"] == Bar(123.456, 100, 200)
    again = page.files(tmp_path)
    assert again == made  # the same picture, byte for byte


def test_the_command(tmp_path, capsys):
    shutil.copy(report.RESULTS / "masks.json", tmp_path)
    assert page.main(["--results", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "benchmarks.md").exists()
    assert (tmp_path / "out" / "benchmarks" / "masks.svg").exists()
    assert Path(capsys.readouterr().out.split()[-1]).name == page.PAGE


def test_a_bar_in_a_cell_is_escaped():
    table = report.Table("t", ["a|b", "c"], [["x", "1"]], ["note"])
    assert table.markdown() == "| a\\|b | c |\n| --- | --: |\n| x | 1 |\n\nnote\n"
