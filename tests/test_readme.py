# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs, block after block, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python"))
    assert code.count("import") > 3
    namespace: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), namespace)
    assert namespace["mixed"].logits.isfinite().all()  # type: ignore[attr-defined]


def test_commands_exist():
    """The demo itself, training and inspecting run in tests/cli."""
    from shira.cli.app import COMMANDS

    makefile = README.with_name("Makefile").read_text()
    commands = re.findall(r"^(make|shira) (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(commands) == 5
    for program, command in commands:
        assert command in COMMANDS if program == "shira" else f"\n{command}:" in makefile


def test_the_table_of_masks_is_complete():
    from shira.masks import MASKS

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert listed == ["mask_type", *MASKS]
