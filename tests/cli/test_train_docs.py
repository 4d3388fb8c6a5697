# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/train.md run, in their order."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.pages import DOCS, commands, what_a_reader_has


def test_commands(tmp_path, monkeypatch):
    from shira.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    what_a_reader_has()
    shutil.copytree("llama", "encoder")
    Path("train.csv").rename("reviews.csv")
    Path("book.txt").write_text("the film was good\n" * 400)
    for line in commands(DOCS / "train.md"):
        program, *arguments = shlex.split(line)
        assert program == "shira"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, line
    for output in ("reviews", "book", "reviews-7"):
        assert json.loads(Path(output, "metrics.json").read_text())
