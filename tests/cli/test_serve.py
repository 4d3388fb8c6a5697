# SPDX-License-Identifier: Apache-2.0
"""``shira serve`` with a package called vllm in whose place a fake server runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shira as package
from shira.cli.serve import EXTENSION, server_command

ROOT = Path(__file__).parents[2]
MAIN = """
import json, os, sys
from pathlib import Path
from tests.serve import fake_server
folder = Path(os.environ["FAKE"])
names = ["VLLM_PLUGINS", "SHIRA_ADAPTERS", "SHIRA_JOURNAL", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"]
names += ["SHIRA_MAX_ADAPTER_MEMORY"]
told = {"arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
(folder / "told").write_text(json.dumps(told))
fake_server.main(folder, os.environ["PLAN"].split(","))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts ``shira serve`` with arguments and a plan; the process."""
    place = tmp_path / "packages" / "vllm" / "entrypoints" / "cli"
    place.mkdir(parents=True)
    for folder in (place, *place.parents[:2]):
        (folder / "__init__.py").write_text("")
    (place / "main.py").write_text(MAIN)
    (tmp_path / "adapters").mkdir()
    sources = [tmp_path / "packages", ROOT, Path(package.__file__).parents[1]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources)), "FAKE": str(tmp_path)}
    processes = []

    def run(plan, *arguments, **more):
        process = subprocess.Popen(
            [sys.executable, "-m", "shira", "serve", *arguments],
            cwd=tmp_path,
            env={**env, "PLAN": plan, **more},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def told(folder):
    return json.loads((folder / "told").read_text())


def until(process, words):
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(lines)


def test_options_are_handed_on_and_the_server_comes_back(start, tmp_path):
    options = ["--dtype", "float32", "-tp", "2", "--port=8001", "-dph", "localhost"]
    own = ["--adapters", "adapters", "--max-adapter-memory", "1000"]
    process = start("die,serve", "model", *own, *options, VLLM_PLUGINS="lora")
    until(process, "starting it again in 1 s (1 of 5)")
    until(process, "is ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert len(list(tmp_path.glob("life-*"))) == 2
    seen = told(tmp_path)
    extension = ["--worker-extension-cls", EXTENSION]
    assert seen["arguments"] == ["serve", "model", *options, *extension]
    assert seen["VLLM_PLUGINS"] == "lora,shira"
    assert seen["SHIRA_ADAPTERS"] == str(tmp_path / "adapters")
    assert seen["SHIRA_MAX_ADAPTER_MEMORY"] == "1000"
    assert seen["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] == "0"
    assert not Path(seen["SHIRA_JOURNAL"]).parent.exists()  # a temporary folder


@pytest.mark.parametrize("env", [{}, {"SHIRA_JOURNAL": "own.json"}])
def test_a_journal_of_ones_own(start, tmp_path, env):
    option = [] if env else ["--journal", "own.json"]
    process = start("fail", "model", *option, **env)
    assert process.wait(60) == 3
    assert told(tmp_path)["SHIRA_JOURNAL"] == str(tmp_path / "own.json")
    assert "ended with status 3 before it was ready" in process.stderr.read()


def test_it_gives_up(start, tmp_path):
    process = start("die", "model", "--max-restarts", "0")
    assert process.wait(60) == 1
    assert "giving up" in process.stderr.read()


def test_another_extension_stays(tmp_path):
    for given in (["--worker-extension-cls", "mine.X"], ["--worker_extension_cls=mine.X"]):
        assert server_command(["model", *given])[-len(given) - 1 :] == ["model", *given]


def test_what_cannot_be_meant(shira, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    Path("adapters").mkdir()
    for arguments, words in {
        # the server would set them aside as journals that cannot be read
        ("--journal", "model/config.json"): "lies in the checkpoint model",
        ("--journal", "."): "holds model",
        ("--journal", "adapters"): "is a folder",
        ("--journal", "adapters", "--adapters", "adapters"): "is read here",
        ("--adapters", "nowhere"): "--adapters nowhere is no folder",
        ("--journal", "nowhere/served.json"): "there is no folder",
        ("--max-restarts", "-1"): "--max-restarts",
    }.items():
        answer = shira("serve", "model", *arguments)
        assert answer.status == 2
        assert words in answer.err
    monkeypatch.setenv("SHIRA_JOURNAL", "adapters")
    assert "adapters: is a folder" in shira("serve", "model").err
    assert shira("serve").status == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answer = shira("serve", "model")
    assert (answer.status, "needs vLLM" in answer.err) == (2, True)
