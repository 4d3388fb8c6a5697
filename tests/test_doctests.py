# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings give what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import shira

ROOT = Path(shira.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".")
    module = importlib.import_module(name.removesuffix(".__init__"))
    names = {
        **{name: getattr(shira, name) for name in shira.__all__},
        "torch": torch,
        "shira": shira,
    }
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert tried
    assert not failed
