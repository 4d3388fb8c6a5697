# SPDX-License-Identifier: Apache-2.0
"""Runs a script of examples/ in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import shira
from tests import forked

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """``run("serving.py")``: what it prints; its files go to ``tmp_path / "out"``.

    With ``check="name"`` the function of that name in `checks` is called in the same process, with
    the script's variables, once the script is through. Another interpreter, and more of the
    environment, can be named. A new interpreter is what its reader starts; what needs none is run
    by `run_forked`, in half the time.
    """

    def run(
        script: str, check: str = "", status: int = 0, python: str = sys.executable, **more: str
    ) -> str:
        how = ["-m", "tests.examples.checks", check] if check else []
        path = os.pathsep.join([str(ROOT), str(Path(shira.__file__).parents[1])])
        done = subprocess.run(
            [python, *how, str(ROOT / "examples" / script), str(tmp_path / "out")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr[-4000:]
        assert {file.name for file in tmp_path.iterdir()} <= {"out"}, "it left files elsewhere"
        return done.stdout if status == 0 else done.stderr

    return run


@pytest.fixture
def run_forked(tmp_path):
    """The same of a script that succeeds, where torch and PEFT may have been imported before.

    With ``count`` it is started so many times, as torchrun does.
    """

    def run(script: str, check: str = "", count: int = 0) -> str:
        path, out = ROOT / "examples" / script, tmp_path / "out"
        if check:
            checks = Path(__file__).with_name("checks.py")
            printed = forked.script(checks, check, path, out, count=count, folder=tmp_path)
        else:
            printed = forked.script(path, out, count=count, folder=tmp_path)
        assert {file.name for file in tmp_path.iterdir()} <= {"out"}, "it left files elsewhere"
        return printed

    return run
