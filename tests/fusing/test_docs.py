# SPDX-License-Identifier: Apache-2.0
"""What docs/fusing.md shows runs: its Python as one program, its commands in turn."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from shira.fusing import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "fusing.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_python_and_commands(tmp_path, monkeypatch):
    from shira.cli import main

    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks("python")), str(PAGE), "exec"), {})
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "shira"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, line
    assert {"both", "tied", "pairs.png"} <= {path.name for path in tmp_path.iterdir()}


def test_the_table_of_methods_says_what_is():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line[:3] == "| `"]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    listed = [row[0].strip("`") for row in rows]
    assert listed == ["method", *(name for name in METHODS if name in listed)]
    assert len(listed) > 8
    for name, _, _, options, _ in rows[1:]:
        method = METHODS[name.strip("`")]
        if method.density is not None and "the same" not in options:
            assert f"`density` ({method.density:g})" in options
