# SPDX-License-Identifier: Apache-2.0
"""The study's harness: equal counts, runs that repeat, a plan that ends, honest tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from studies import runner as common
from studies.accuracy import document, tables
from studies.accuracy.__main__ import main
from studies.accuracy.metrics import matthews
from studies.accuracy.plan import chosen, plan
from studies.accuracy.protocol import GRIDS, METHODS, SIZES, TASKS, TUNING_TASKS, Run, cells
from studies.accuracy.runs import STUDY, Done
from tests.pages import ROOT, commands

SMALL = {"steps": 2, "batch_size": 4, "validation_rows": 8, "test_rows": 8, "max_tokens": 8}
ROWS = {"training_rows": 50, "validation_rows": 8, "max_tokens": 8, "frozen_blocks": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "trec6"
    folder.mkdir()
    (folder / "labels.json").write_text('["fruit", "metal"]')
    words = [("apple", 0), ("iron", 1), ("pear", 0), ("zinc", 1)]
    for name, count in (("train", 10), ("test", 6)):
        rows = [{"text": f"{word} {i}", "label": y} for i in range(count) for word, y in words]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder.parent


def figure(run: Run) -> float:
    """A made-up validation figure that is best at an exponent that differs from cell to cell."""
    best = min(GRIDS[run.method]) + len(run.method) % 5 - 1
    return 0.8 - abs(run.rate_exponent - best) / 10


def fake(run: Run, data: Path | None = None) -> tuple[dict, dict]:
    result = {"metric": TASKS[run.task], "seconds": {"wall": 0.0, "processor": 0.0}}
    if run.stage == "final":
        result["test"] = figure(run) + run.seed / 100
    else:
        result["validation"] = figure(run)
    return result, {}


def finished() -> dict[str, Done]:
    done: dict[str, Done] = {}
    while runs := plan(done).runs:
        done |= {run.key: Done(run, fake(run)[0]) for run in runs}
    return done


@pytest.fixture(scope="module")
def everything() -> dict[str, Done]:
    return finished()


def test_every_method_of_a_size_trains_equally_many_parameters(data: Path) -> None:
    from studies.accuracy import data as rows
    from studies.accuracy.methods import adapt, trained
    from studies.accuracy.model import Classifier
    from studies.accuracy.train import batches

    training, _ = rows.splits(data, "trec6", **ROWS)
    for method in METHODS:
        if method in ("head", "full"):
            continue
        for size, rank in SIZES.items():
            run = Run("tuning", "trec6", method, size, -5, 0, **SMALL)
            base = Classifier(2, frozen_blocks=3, seed=0)
            model = adapt(base, run, lambda run=run: list(batches(training, run, 1, "m")))
            assert trained(model) == {"encoder": rank * 20736, "head": 2 * 384 + 2}, (method, size)


@pytest.mark.parametrize("method", ["lora", "peft-shira", "shira-snip"])
def test_a_run_repeats_to_the_last_digit_and_learns(data: Path, method: str) -> None:
    from studies.accuracy.train import execute

    run = Run("final", "trec6", method, "small", -5, 1, **SMALL)
    first, second = (execute(run, data) for _ in range(2))
    for timing in ("seconds", "read_seconds", "adapt_seconds", "train_seconds"):
        first.pop(timing), second.pop(timing)
    assert first == second
    assert first["finite"]
    longer = execute(replace(run, steps=30), data)
    assert longer["loss"] < first["loss"]


def test_a_tuning_run_does_not_need_the_test_rows(data: Path, tmp_path: Path) -> None:
    from studies.accuracy.train import execute

    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "trec6" / "test.jsonl").unlink()
    result = execute(Run("tuning", "trec6", "head", None, -3, 0, **SMALL), tmp_path / "data")
    assert "test" not in result
    with pytest.raises(FileNotFoundError):
        execute(Run("final", "trec6", "head", None, -3, 0, **SMALL), tmp_path / "data")


def test_validation_rows_are_not_trained_on(data: Path) -> None:
    from studies.accuracy import data as rows

    training, validation = rows.splits(data, "trec6", **ROWS)
    assert (len(training.states), len(validation.states)) == (32, 8)
    seen = {tuple(row.flatten().tolist()) for row in training.states}
    assert not seen & {tuple(row.flatten().tolist()) for row in validation.states}


@pytest.mark.parametrize("frozen_blocks", [0, 3, 6])
def test_the_two_parts_are_the_whole_encoder(frozen_blocks: int) -> None:
    import torch
    from transformers import AutoModel

    from shira.cli.demo.classification import model_path
    from studies.accuracy.model import Classifier, batch, pad, states

    ids = [[101, 7592, 102], [101, 2088, 2003, 2307, 102]]
    whole = AutoModel.from_pretrained(model_path()).eval()
    model = Classifier(3, frozen_blocks=frozen_blocks, seed=0).eval()
    padded, mask = pad([torch.tensor(row) for row in ids])
    with torch.no_grad():
        last = whole(input_ids=padded, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1)
        mean = (last * mask).sum(dim=1) / mask.sum(dim=1)
        pooled = torch.nn.functional.normalize(mean, dim=1) * mean.shape[1] ** 0.5
        logits = model(**batch(states(ids, frozen_blocks, 0))).logits
        torch.testing.assert_close(logits, model.classifier(pooled), rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_are_of_similar_length_and_all_are_seen(data: Path) -> None:
    import torch

    from studies.accuracy.data import Split
    from studies.accuracy.train import batches

    split = Split([torch.full((1 + i % 7, 2), float(i)) for i in range(64)], [0] * 64, "")
    run = Run("tuning", "trec6", "lora", "small", -5, 0, batch_size=8, group_batches=4)
    made = list(batches(split, run, 8, "training"))
    seen = [int(states[0, 0]) for batch in made for states in batch["states"]]
    assert sorted(seen) == list(range(64))
    lengths = [batch["attention_mask"].sum(dim=1) for batch in made]
    assert max(int(row.max() - row.min()) for row in lengths) <= 3
    again = list(batches(split, run, 8, "training"))
    assert all(torch.equal(a["states"], b["states"]) for a, b in zip(made, again, strict=True))


def test_an_empty_study_begins_with_tuning() -> None:
    left = plan({})
    assert not left.final
    assert len(left.tuning) == len(TUNING_TASKS) * sum(len(GRIDS[method]) for method, _ in cells())
    assert left.unknown_finals == len(TASKS) * len(cells()) * 3
    assert len({run.key for run in left.tuning}) == len(left.tuning)


def test_tuning_goes_beyond_an_edge_and_then_ends(everything: dict[str, Done]) -> None:
    for method, size in cells():
        assert chosen(everything, method, size) == min(GRIDS[method]) + len(method) % 5 - 1
    assert plan(everything).missing == 0


def test_the_rate_is_that_of_the_best_mean_and_of_equals_the_lower() -> None:
    runs = [run for run in plan({}).tuning if (run.method, run.size) == ("lora", "small")]
    figures = {"trec6": (0.5, 0.8, 0.1), "banking77": (0.6, 0.3, 0.1), "subj": (0.7, 0.7, 0.1)}
    low = min(GRIDS["lora"])

    def result(run: Run) -> dict:
        tried = run.rate_exponent - low
        return {"validation": figures[run.task][tried] if tried >= 0 else 0.0}

    done = {run.key: Done(run, result(run)) for run in runs}
    assert chosen(done, "lora", "small") is None, "the lowest is as good as the middle: go lower"
    more = [run for run in plan(done).tuning if (run.method, run.size) == ("lora", "small")]
    assert {run.rate_exponent for run in more} == {low - 1}
    done |= {run.key: Done(run, result(run)) for run in more}
    assert chosen(done, "lora", "small") == low


def test_final_runs_come_seed_by_seed() -> None:
    done: dict[str, Done] = {}
    while runs := plan(done).tuning:
        done |= {run.key: Done(run, fake(run)[0]) for run in runs}
    left = plan(done)
    assert [run.seed for run in left.final] == sorted(run.seed for run in left.final)
    assert len(left.final) == len(TASKS) * len(cells()) * 3


def test_the_runner_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Run] = []

    def execute(_: str, batched: bool, given: dict, runs: tuple, data: Path) -> tuple[list, dict]:
        if len(made) == 40:
            raise KeyboardInterrupt
        (run,) = runs
        made.append(run)
        return [fake(run)[0]], {}

    monkeypatch.setattr(common, "execute", execute)
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    tasks = list(TUNING_TASKS)

    def go_on(jobs: int, minutes: float | None = None) -> int:
        return STUDY.continue_runs(
            lambda done: plan(done, tasks).runs,
            tmp_path, jobs=jobs, minutes=minutes, folder=tmp_path,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        go_on(jobs=1)
    assert go_on(jobs=2, minutes=0) == 0
    before = len(made)
    made.append(made[0])  # past the number that interrupts
    # many at a time: between them the plan is made again, which is what takes long
    count = go_on(jobs=16)
    assert plan(STUDY.load(tmp_path), tasks).missing == 0
    assert len(STUDY.load(tmp_path)) == before + count
    kept = [run for i, run in enumerate(made) if i != before]
    assert len(kept) == len(set(kept)), "a run was made twice"


def test_a_cut_line_is_dropped_and_a_changed_one_refused(tmp_path: Path) -> None:
    first, second = plan({}).tuning[:2]
    STUDY.append(first, fake(first)[0], {}, tmp_path)
    path = tmp_path / "tuning.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert list(STUDY.load(tmp_path)) == [first.key]
    STUDY.append(second, fake(second)[0], {}, tmp_path)
    assert list(STUDY.load(tmp_path)) == [first.key, second.key]
    path.write_text(whole.replace('"steps": 64', '"steps": 65'))
    with pytest.raises(ValueError, match=r"tuning.jsonl, line 1: key"):
        STUDY.load(tmp_path)


def test_tables_fill_only_when_all_runs_are_there(everything: dict[str, Done]) -> None:
    row = next(x for x in tables.finals(everything).splitlines() if x.startswith("| lora | small"))
    assert row.count("82.0 ± 1.0") == len(TASKS) + 2
    lost = next(key for key, entry in everything.items() if entry.run.stage == "final")
    without = {key: entry for key, entry in everything.items() if key != lost}
    method, task = everything[lost].run.method, everything[lost].run.task
    assert tables.final_figures(without, task, method, everything[lost].run.size) is None
    assert plan(without).missing == 1
    empty = tables.finals({}) + tables.paired({}) + tables.rates({})
    assert "±" not in empty


def test_pairs_are_of_one_task_and_seed(everything: dict[str, Done]) -> None:
    differences = tables.paired_differences(everything, "dora", "small", "small")
    assert differences == [[pytest.approx(0.0)] * len(TASKS)] * 3


def test_the_page_is_what_the_committed_runs_give(tmp_path: Path) -> None:
    shutil.copy(document.DOCS / "study.md", tmp_path)
    document.rebuild(tmp_path)
    written = (tmp_path / "study.md").read_text()
    assert written == (document.DOCS / "study.md").read_text(), "run `make study`"


def test_the_commands_of_the_page_do_what_it_says() -> None:
    shown = commands(document.DOCS / "study.md")
    assert shown == ["make study", "make study RUN=1"]
    for line, end in zip(shown, ("", " run"), strict=True):
        command = ["make", "--no-print-directory", "-n", *line.split()[1:]]
        planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        ran = [line.rstrip().split("-m ")[1] for line in planned.stdout.splitlines()[-3:]]
        assert ran == [f"studies.{study}{end}" for study in ("accuracy", "fusion", "lm")]


def test_absent_tasks_are_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "rebuild", lambda: [])
    assert main(["run", "--data", str(tmp_path), "--tasks", "cola"]) == 0
    assert "skipped: cola: " in capsys.readouterr().out


def test_matthews_correlation() -> None:
    assert matthews([1, 1, 0, 0], [1, 1, 0, 0]) == 1
    assert matthews([1, 1, 1, 1], [1, 1, 0, 0]) == 0
    assert matthews([1, 1, 0, 1], [1, 1, 0, 0]) == pytest.approx(1 / 3**0.5)
