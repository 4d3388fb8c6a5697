# SPDX-License-Identifier: Apache-2.0
"""examples/serving.py: with vLLM (``make test-vllm``) it serves, without it says what it needs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from shira import Adapter

from .conftest import ROOT

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


TRAINER = ROOT / ".venv" / "bin" / "python"


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make test-vllm")
@pytest.mark.skipif(not TRAINER.exists(), reason="TRL is in the main environment: make install")
def test_reinforcement_learning_on_a_server(run, tmp_path, tmp_path_factory):
    """The trainer runs in the main environment, the server in this one."""
    from benchmarks import vllm_server as server
    from tests.serve.engine.guide import fork_engines

    beside = tmp_path_factory.mktemp("server")
    packages = server.command_line_on_cpu(beside / "packages")
    fork_engines(packages)
    env = server.environment(packages)
    vllm = beside / "vllm"
    names = [*server.QUIET, "PYTHONPATH", "PATH"]
    lines = [f"export {name}={shlex.quote(env[name])}" for name in names]
    command = shlex.quote(str(Path(sys.executable).with_name("vllm")))
    vllm.write_text("\n".join(["#!/bin/sh", *lines, f'exec {command} "$@"', ""]))
    vllm.chmod(0o755)
    printed = run("grpo.py", python=str(TRAINER), VLLM=str(vllm), HF_HUB_OFFLINE="1")
    sent = re.findall(r"step \d+: ([\d,]+) bytes in \d+ ms, equal bits", printed)
    assert len(sent) == 20
    assert "refused: 1 of the" in printed
    assert printed.rstrip().endswith("the base again, bit for bit")
    values = re.search(r"each step sent ([\d,]+) values", printed)
    assert {int(each.replace(",", "")) for each in sent} == {4 * int(values[1].replace(",", ""))}


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
@pytest.mark.parametrize("script", ["serving.py", "grpo.py"])
def test_without_vllm(run, tmp_path, script):
    said = run(script, status=1, VLLM="", PATH=os.path.dirname(sys.executable))
    assert said.startswith("This example needs vLLM, which is not installed: pip install vllm")
    assert not (tmp_path / "out").exists()
