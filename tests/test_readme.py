# SPDX-License-Identifier: Apache-2.0
"""README.md: its Python runs as one program, its commands in turn, with those of start.md."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.pages import DOCS, README, blocks, commands, what_a_reader_has


@pytest.mark.filterwarnings("ignore")
def test_python_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(README, "python"))
    assert code.count("import") > 3
    namespace: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), namespace)
    mixed = namespace["mixed"].logits  # type: ignore[attr-defined]
    assert mixed.isfinite().all()
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if "all  " in line)
    assert not {"0", "0.0000", "+0.0000"} & set(total), total  # something to look at


def test_commands(tmp_path, monkeypatch):
    """In their order, in a folder that holds what their reader has: a model, rows, adapters."""
    from shira.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    what_a_reader_has()
    lines = [shlex.split(line) for line in commands(README) + commands(DOCS / "start.md")]
    assert len(lines) >= 13
    for program, command, *arguments in lines:
        if program == "pip":
            extra = re.search(r"shira\[(\w+)\]", arguments[0])
            assert f"\n{extra[1]} = [" in README.with_name("pyproject.toml").read_text()
            continue
        if program == "make":
            assert f"\n{command}: " in README.with_name("Makefile").read_text()
            continue
        assert program == "shira"
        if command == "demo":
            continue  # takes minutes; tests/cli/test_demo.py runs it with --quick
        arguments = ["llama" if word == "MODEL" else word for word in arguments]
        with pytest.raises(SystemExit) as stop:
            main([command, *arguments])
        assert not stop.value.code, (command, *arguments)
        if command == "merge":
            shutil.copytree("llama-merged", "llama-tuned")
    for made in ("masks.png", "both", "overlap.png", "report.html", "extracted.safetensors"):
        assert Path(made).exists(), made
    for file in Path("llama").iterdir():
        assert file.read_bytes() == Path("llama-again", file.name).read_bytes()


def test_the_table_of_masks_has_those_of_the_paper():
    from shira.masks import MASKS

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert listed == ["mask_type", *(name for name in MASKS if name in listed)]
    assert set(listed) >= {name for name, spec in MASKS.items() if spec.source[0] != "("}
