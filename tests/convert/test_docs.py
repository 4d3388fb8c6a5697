# SPDX-License-Identifier: Apache-2.0
"""What docs/converting.md shows runs: its Python as one program, its commands in turn."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shira.store import FORMATS

PAGE = Path(__file__).parents[2] / "docs" / "converting.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(code: str) -> None:
    exec(compile(code, str(PAGE), "exec"), {})


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("\n".join(blocks("python")))
    made = {"again", "found", "merged", "merged.undo", "patch.safetensors", "restored"}
    assert made <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif("compact" not in FORMATS, reason="no compact format")
def test_commands(tmp_path, monkeypatch):
    from shira.cli import main

    monkeypatch.chdir(tmp_path)
    run(blocks("python")[0])
    Path("my-lora").mkdir()
    key = "base_model.model.model.layers.0.up_proj"
    factors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, "my-lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    Path("my-lora/adapter_config.json").write_text(json.dumps(config))
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "shira"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, line
        if arguments[0] == "merge":
            shutil.copytree("merged", "tuned")
