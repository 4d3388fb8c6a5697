# SPDX-License-Identifier: Apache-2.0
"""A vLLM server in a process of its own, for tests and benchmarks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_line_on_cpu(folder: Path) -> Path:
    """What ``vllm serve`` needs beside vllm-cpu: it asks for the version of a package "vllm"."""
    version = metadata.version("vllm-cpu")
    package = folder / f"vllm-{version}+cpu.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    )
    return folder


def environment(packages: Path, **more: str) -> dict[str, str]:
    """Of the server's process; programs are found beside this interpreter first."""
    env = {**os.environ, **QUIET, **more}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), env.get("PYTHONPATH")]))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    return env


@contextmanager
def running(arguments: list[str], port: int, log: Path, **process) -> Iterator[subprocess.Popen]:
    """The process, once it answers; stopped with all its children at the end.

    Raises:
        RuntimeError: If it ends, or does not answer in ten minutes; with the end of its log.
    """
    with started(arguments, log, **process) as server:
        wait_until_it_answers(server, port, log)
        yield server


@contextmanager
def started(arguments: list[str], log: Path, **process) -> Iterator[subprocess.Popen]:
    """The process, which may not answer yet; stopped with all its children at the end."""
    if "env" in process:  # programs are looked up where the server's own are
        found = shutil.which(arguments[0], path=process["env"]["PATH"])
        arguments = [found or arguments[0], *arguments[1:]]
    with log.open("w") as out:
        server = subprocess.Popen(
            arguments, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **process
        )
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


def wait_until_it_answers(server: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no server:\n{log.read_text()[-4000:]}")
