# SPDX-License-Identifier: Apache-2.0
"""Runs a script of examples/ as its reader does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import shira

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """``run("trainer.py")``: what it prints; its files go to ``tmp_path / "out"``.

    With ``check="name"`` the function of that name in `checks` is called in the same process, with
    the script's variables, once the script is through. Another interpreter, and more of the
    environment, can be named.
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
