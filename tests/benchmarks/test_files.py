# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import files
from benchmarks.__main__ import main


def test_files_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "files.json"
    size = "--rows 256 --cols 192 --weights 2 --densities 0.01,0.02 --block-size 8 --repeats 2"
    assert main(["files", *size.split(), "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["answers"]["loaded_equals_saved"] is True
    sizes = written["results"]["bytes_an_entry"]
    assert set(files.FORMATS) <= set(sizes)
    assert sizes["compact int8, seed"] < sizes["compact bf16, seed"] < sizes["compact bf16, gaps"]
    assert sizes["compact bf16, gaps"] < sizes["PEFT format, bf16"] < files.STOCK
    coding = written["results"]["coding"]
    assert list(coding) == ["gaps, 1 %", "gaps, 2 %", "blocks of 8, 2 %", "seed, 2 %"]
    assert coding["gaps, 2 %"]["indices"] == round(0.02 * 256 * 192)
    assert all(row["decode_wall_seconds"]["min"] > 0 for row in coding.values())
    for row in written["results"]["whole"].values():
        assert row["bytes"] > 2 * row["entries"]
        assert all(row["save_over_write"][kind]["of_min"] > 0 for kind in ("wall", "cpu"))
        assert row["load_over_read"]["wall"]["median"] > 0
    said = capsys.readouterr().out
    assert "bytes an entry" in said
    assert "million a second" in said
    assert "writing and flushing the very bytes" in said


def test_wrong_indices_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from shira.ops import gaps

    decode = gaps.decode
    monkeypatch.setattr(gaps, "decode", lambda *given: decode(*given) + 1)
    with pytest.raises(RuntimeError, match="not what was"):
        files.run(files.Settings(rows=64, cols=64, weights=1, densities="0.02", repeats=1))
