# SPDX-License-Identifier: Apache-2.0
"""The suite ``fusing`` runs, in small, and what it writes can be printed."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import fusing
from benchmarks.__main__ import main
from shira.fusing import METHODS


def test_suite(tmp_path: Path) -> None:
    path = tmp_path / "fusing.json"
    assert main(["fusing", "--width", "64", "--repeats", "2", "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["answers"] == {"sum_equals_dense_bit_for_bit": True, "ties_equals_peft": True}
    assert set(written["results"]["methods"]) >= set(METHODS)
    assert set(written["results"]["growth"]) == {f"{n} x {n}" for n in (32, 64, 128, 256)}
    assert [len(table.rows) for table in fusing.tables(written)] == [len(METHODS) + 2, 4, 3]
