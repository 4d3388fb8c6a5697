# SPDX-License-Identifier: Apache-2.0
"""Starts two processes and reads what they found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.forked import ranks

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def launch(module: str, out: Path, *cases: str) -> dict[str, list]:
    """``{case: [result of rank 0, of rank 1]}`` of ``tests.distributed.<module>``."""
    ranks(2, f"tests.distributed.{module}", out, *cases, DS_ACCELERATOR="cpu")
    found: dict[str, list] = torch.load(out, weights_only=False)
    return found
