# SPDX-License-Identifier: Apache-2.0
"""What docs/chain.md shows runs: its Python as one program, its commands in turn."""

from __future__ import annotations

import shlex

import pytest

from tests.pages import DOCS, blocks

PAGE = DOCS / "chain.md"


def test_python_and_commands(tmp_path, monkeypatch):
    from shira.cli import main

    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(PAGE, "python")), str(PAGE), "exec"), {})
    lines = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "shira"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, line
    weights = [tmp_path / name / "model.safetensors" for name in ("here", "step-2")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
