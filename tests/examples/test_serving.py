# SPDX-License-Identifier: Apache-2.0
"""examples/serving.py: with vLLM (``make test-vllm``) it serves, without it says what it needs."""

from __future__ import annotations

import importlib.util

import pytest

from shira import Adapter

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make test-vllm")
def test_with_vllm(run, tmp_path):
    printed = run("serving.py")
    answers = [line for line in printed.splitlines() if line.endswith("as transformers says")]
    assert len(answers) == 5
    assert len(set(answers)) == 4
    assert answers[0] == answers[-1]
    assert "the same bits as before" in printed
    for name in ("french", "german"):
        adapter = Adapter.load(tmp_path / "out" / name)
        assert f"{name}: {adapter.nnz:,} entries" in printed


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm(run, tmp_path):
    said = run("serving.py", status=1)
    assert said.startswith("This example needs vLLM, which is not installed: pip install vllm")
    assert not (tmp_path / "out").exists()
