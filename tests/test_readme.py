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


def test_commands_and_their_options_exist():
    """The demo, training and the others run in tests/cli."""
    from typer.testing import CliRunner

    from shira.cli.app import COMMANDS, build_app

    makefile = README.with_name("Makefile").read_text()
    lines = re.findall(r"^(make|shira) ([\w-]+)(.*)", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(lines) >= 12
    for program, command, rest in lines:
        if program == "make":
            assert f"\n{command}:" in makefile
            continue
        assert command in COMMANDS
        shown = (
            CliRunner()
            .invoke(build_app([command]), [command, "--help"], env={"COLUMNS": "200"})
            .output
        )
        for option in re.findall(r" (--[\w-]+)", rest):
            assert option in shown, f"shira {command} has no {option}"


def test_the_table_of_masks_is_complete():
    from shira.masks import MASKS

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert listed == ["mask_type", *MASKS]
