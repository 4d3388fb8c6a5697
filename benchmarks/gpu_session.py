# SPDX-License-Identifier: Apache-2.0
"""``make gpu``: everything that waits for a GPU, one part after the other, in at most 8 minutes.

A part is a command in a process of its own, with a limit of its own; what one leaves undone loses
nothing of the others. After each, ``session.json`` in the folder of results says what became of it
(``done``, ``failed``, ``out of time``, ``not measured``), beside its log and what it wrote itself.
Without a GPU every part is "not measured", which is no failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480


@dataclass(frozen=True)
class Part:
    """One command; ``{out}`` is the folder of results, ``{study}`` that of `--study`."""

    name: str
    seconds: int
    command: tuple[str, ...]
    """After ``python -m``."""


PARTS = (
    Part(
        "tests",
        70,
        (
            *("pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_base.py"),
            *("tests/ops/gradient", "tests/masks/test_scored.py", "tests/switch/test_targets.py"),
            *("tests/tuner/test_compile.py", "tests/studies/test_lm.py"),
        ),
    ),
    Part("steps", 150, ("benchmarks", "gpu", "--repeats", "7", "--output", "{out}/gpu.json")),
    Part(
        "adapters",
        110,
        ("benchmarks", "gpu_adapters", "--output", "{out}/gpu_adapters.json"),
    ),
    Part(
        "study",
        150,
        (
            *("studies.lm", "run", "--device", "cuda", "--jobs", "6", "--together", "4"),
            *("--minutes", "2", "--parts", "{study}", "--data", "{study}/one/data"),
            *("--results", "{out}/lm"),
        ),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts. 1 if one that could be measured was not; 0 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--study", type=Path, metavar="FOLDER", help="--parts of `studies.lm pack`")
    parser.add_argument("--only", metavar="PART,PART", help=", ".join(part.name for part in PARTS))
    options = parser.parse_args(arguments)
    if unknown := {*(options.only or "").split(",")} - {"", *(part.name for part in PARTS)}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    out = options.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"environment": environment.describe(), "parts": {}}
    for part in PARTS:
        if options.only and part.name not in options.only.split(","):
            continue
        found = document["parts"][part.name] = _measured(part, out, options.study)
        report.write(document, out / "session.json")
        print(f"{part.name}: {found['state']}{': ' * bool(found['why'])}{found['why']}", flush=True)
    states = {found["state"] for found in document["parts"].values()}
    return int(bool(states & {"failed", "out of time"}))


def unavailable() -> str | None:
    """Why nothing can be measured here; None if it can."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _measured(part: Part, out: Path, study: Path | None) -> dict[str, Any]:
    """Run one part; what became of it."""
    why = unavailable()
    if not why and study is None and any("{study}" in word for word in part.command):
        why = "it needs --study FOLDER"
    if why:
        return {"state": "not measured", "why": why, "seconds": None}
    folders = {"out": str(out), "study": str(study and study.resolve())}
    command = [sys.executable, "-m", *(word.format(**folders) for word in part.command)]
    packages = str(study.resolve() / "one" / "site") if study else ""  # that pack has put there
    found = [str(ROOT / "src"), str(ROOT), packages, os.environ.get("PYTHONPATH", "")]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}
    log, start = out / f"{part.name}.txt", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=surroundings,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts itself can be ended with it
        )
        try:
            status = process.wait(part.seconds)
            state, why = ("failed", f"exit status {status}") if status else ("done", "")
        except subprocess.TimeoutExpired:
            state, why = "out of time", f"over {part.seconds} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if state != "done":
        why += f", see {log.name}: {' '.join(log.read_text(errors='replace').split()[-40:])}"
    return {"state": state, "why": why, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    sys.exit(main())
