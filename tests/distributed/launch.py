# SPDX-License-Identifier: Apache-2.0
"""Starts two processes by torchrun and reads what they found."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shira

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

ROOT = Path(__file__).parents[2]


def launch(module: str, out: Path, *cases: str) -> dict[str, list]:
    """``{case: [result of rank 0, of rank 1]}`` of ``tests.distributed.<module>``."""
    path = os.pathsep.join([str(ROOT), str(Path(shira.__file__).parents[1])])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", f"tests.distributed.{module}", str(out), *cases),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list] = torch.load(out, weights_only=False)
    return found
