# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` with parts that stand in for those that need a GPU, and without a GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suites
from benchmarks import gpu_session
from benchmarks.gpu_session import PARTS, ROOT, Part


def states(folder: Path) -> dict[str, str]:
    written = json.loads((folder / "session.json").read_text())
    return {name: part["state"] for name, part in written["parts"].items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_nothing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_session.main(["--output", str(tmp_path)]) == 0
    assert states(tmp_path) == {part.name: "not measured" for part in PARTS}
    assert capsys.readouterr().out.count("not measured: torch sees no CUDA device") == len(PARTS)


def stand_in(name: str, body: str, seconds: int = 60) -> Part:
    return Part(name, seconds, ("timeit", "-n1", "-r1", body))


def test_each_part_has_its_limit_and_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tmp_path / "late"
    code = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    monkeypatch.setattr(gpu_session, "unavailable", lambda: None)
    monkeypatch.setattr(
        gpu_session,
        "PARTS",
        (
            stand_in("slow", child, seconds=2),
            stand_in("wrong", "print(1 / 0)"),
            stand_in("right", "import shira, benchmarks; open('{out}/x', 'w').write('1')"),
            Part("study", 1, ("studies.lm", "--parts", "{study}")),
        ),
    )
    assert gpu_session.main(["--output", str(tmp_path)]) == 1
    assert states(tmp_path) == {
        "slow": "out of time",
        "wrong": "failed",
        "right": "done",
        "study": "not measured",
    }
    out = capsys.readouterr().out
    assert "over 2 s" in out
    assert "ZeroDivisionError" in out
    assert "needs --study" in out
    assert (tmp_path / "x").read_text() == "1"
    time.sleep(3)
    assert not late.exists()  # what a part has started ends with it


def test_the_parts_fit_into_the_session_and_are_commands_that_exist() -> None:
    assert sum(part.seconds for part in PARTS) <= gpu_session.SECONDS
    for part in PARTS:
        module, *options = part.command
        if module == "benchmarks":
            suites._parser().parse_args(options)
        elif module == "pytest":
            marked = [word for word in options if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in marked)
            of_gpus = {
                path.relative_to(ROOT)
                for path in (ROOT / "tests").rglob("test_*.py")
                if "mark.gpu" in path.read_text() and path != Path(__file__)
            }
            assert all(any(path.is_relative_to(at) for at in marked) for path in of_gpus), of_gpus
        else:
            assert (ROOT / module.replace(".", "/") / "__main__.py").exists()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu_session.main(["--output", str(tmp_path), "--only", "nothing"])
