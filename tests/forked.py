# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own, forked from one that has imported torch, PEFT and no shira.

A new interpreter takes six seconds for these imports. The process that is forked is started on
first use, once in each worker of pytest.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers.trainer", "peft"])


def program(code: str, *arguments: object) -> str:
    """What ``python -W ignore -c CODE ARGUMENTS...`` prints.

    Raises:
        AssertionError: If it fails; with the end of what it said.
    """
    return _run(_execute, code, arguments, [{}])


def script(path: Path, *arguments: object, count: int = 0, folder: Path | None = None) -> str:
    """What ``python PATH ARGUMENTS...`` prints in a folder; given a count, torchrun of so many."""
    return _run(_execute_file, str(path), arguments, _environments(count), folder)


def ranks(count: int, module: str, *arguments: object, **env: str) -> None:
    """Does what ``torchrun --standalone --nproc-per-node COUNT -m MODULE ARGUMENTS...`` does.

    Raises:
        AssertionError: If a rank fails; with the end of what all said.
    """
    each = [{**env, **own} for own in _environments(count)]
    _run(_execute_module, module, arguments, each)


def _environments(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many ranks; of none, a process that is no rank."""
    if not count:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _run(
    execute: Callable[[str], None],
    what: str,
    arguments: tuple[object, ...],
    envs: list[dict[str, str]],
    cwd: Path | None = None,
) -> str:
    argv = ["-c", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        processes = [
            _context.Process(target=_begin, args=(execute, what, argv, env, cwd, out, err))
            for env in envs
        ]
        for process in processes:
            process.start()
        running = processes
        while running and not any(process.exitcode for process in processes):
            ended = wait([process.sentinel for process in running], timeout=300)
            assert ended, "it did not end in five minutes"
            for process in running:
                process.join(0)
            running = [process for process in running if process.exitcode is None]
        for process in running:
            process.kill()
            process.join()
        assert not any(process.exitcode for process in processes), err.read_text()[-4000:]
        return out.read_text()


def _begin(
    execute: Callable[[str], None],
    what: str,
    argv: list[str],
    env: dict[str, str],
    cwd: Path | None,
    out: Path,
    err: Path,
) -> None:
    import torch

    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    torch.set_num_threads(1)
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = argv
    execute(what)


def _execute(code: str) -> None:
    warnings.simplefilter("ignore")
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def _execute_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _execute_file(path: str) -> None:
    sys.argv[0] = path
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
