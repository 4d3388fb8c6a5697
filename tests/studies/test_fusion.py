# SPDX-License-Identifier: Apache-2.0
"""The study of fusing: what the families share, that fusing is undone, honest tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from studies.accuracy import runs as accuracy
from studies.accuracy.plan import plan
from studies.fusion import document, runs, tables
from studies.fusion.protocol import FAMILIES, LOW_RANK, SEEDS, SPARSE, TASKS, Run
from studies.page import DOCS
from studies.store import Done, append
from tests.pages import commands

pytestmark = pytest.mark.slow
SMALL = {"steps": 2, "batch_size": 4, "training_rows": 20, "validation_rows": 8, "max_tokens": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder / task).mkdir()
        (folder / task / "labels.json").write_text('["fruit", "metal"]')
        words = [("apple", 0), ("iron", 1), ("pear", 0), ("zinc", 1)]
        for name in ("train", "test"):
            rows = [{"text": f"{w} of {task} {i}", "label": y} for i in range(8) for w, y in words]
            (folder / task / f"{name}.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in rows)
            )
    return folder


@pytest.fixture(scope="module")
def results(data: Path) -> dict[str, dict[str, Any]]:
    from studies.fusion.measure import execute

    return {name: execute(Run(name, -4, 1, test_rows=8), data, **SMALL) for name in FAMILIES}


def test_every_way_is_measured_on_every_task(results: dict[str, dict[str, Any]]) -> None:
    for family, result in results.items():
        assert list(result["fused"]) == list(LOW_RANK if family == "lora" else SPARSE)
        for figures in (*result["fused"].values(), result["alone"], result["without"]):
            assert set(figures) == set(TASKS)
            assert all(0 <= figure <= 1 for figure in figures.values())


def test_all_families_train_equally_many_parameters(results: dict[str, dict[str, Any]]) -> None:
    assert {result["trained"] for result in results.values()} == {62208}


def test_families_differ_in_what_they_share(results: dict[str, dict[str, Any]]) -> None:
    shared = {family: result["overlap"]["shared"] for family, result in results.items()}
    assert shared["same"] == shared["lora"] == 1
    assert shared["slots"] == results["slots"]["overlap"]["cosine"] == 0
    assert shared["independent"] == pytest.approx(0.0117, abs=0.002)  # by chance: the density
    assert shared["independent"] < shared["grad"] < 1


def test_the_overlap_of_low_rank_adapters_is_that_of_their_products() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from studies.fusion.adapters import overlaps

    names = ["first", "second"]
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    model.add_adapter(names[1], config)
    layer = model.base_model.model[0]
    a, b = (layer.get_delta_weight(name).detach().flatten().double() for name in names)
    expected = float(a @ b / (a.norm() * b.norm()))
    assert overlaps(model, names) == {
        "shared": 1.0,
        "cosine": pytest.approx(expected, abs=2e-6),
    }


def test_runs_wait_for_the_tuned_rates(tmp_path: Path) -> None:
    assert runs.wanted({}) == []
    done: dict[str, accuracy.Done] = {}
    while left := [r for r in plan(done).tuning if (r.method, r.size) == ("lora", "small")]:
        done |= {r.key: Done(r, {"validation": -abs(r.rate_exponent + 5)}) for r in left}
    assert runs.wanted(done) == [Run("lora", -5, seed) for seed in SEEDS]
    first = runs.wanted(done)[0]
    append(first, {"fused": {}}, {}, tmp_path)
    assert list(runs.STUDY.load(tmp_path)) == [first.key]


def test_tables_fill_only_when_all_seeds_are_there() -> None:
    def made(family: str, seed: int) -> Done[Run]:
        run = Run(family, -4, seed)
        same = dict.fromkeys(TASKS, 0.8)
        fused = {way: dict.fromkeys(TASKS, 0.7 + seed / 100) for way in run.ways}
        figures = {"alone": same, "others": same, "without": same, "fused": fused}
        return Done(run, {**figures, "overlap": {"shared": 1.0, "cosine": 0.0}})

    every = [made("slots", seed) for seed in SEEDS]
    done = {entry.run.key: entry for entry in every}
    line = next(x for x in tables.losses(done).splitlines() if x.startswith("| ties |"))
    assert line.count("-8.0 ± 1.0") == 1
    del done[every[0].run.key]
    for table in (tables.overlaps, tables.alone, tables.kept, tables.losses):
        assert "±" not in table(done)


def test_the_page_is_what_the_committed_runs_give(tmp_path: Path) -> None:
    shutil.copy(DOCS / document.PAGE, tmp_path)
    document.rebuild(tmp_path)
    written = (tmp_path / document.PAGE).read_text()
    assert written == (DOCS / document.PAGE).read_text(), "run `make study`"


def test_the_commands_of_the_page_are_those_of_the_others() -> None:
    """Those of study-fusion.md and of study.md, which tests/studies/test_accuracy.py runs."""
    assert commands(DOCS / document.PAGE) == commands(DOCS / "study.md")
