# SPDX-License-Identifier: Apache-2.0
"""The study of language modelling: equal counts, runs that repeat, a plan that ends, its page."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studies import runner as common
from studies.language import base as bases
from studies.language import data as texts
from studies.language import document, runner, store, tables
from studies.language.__main__ import main
from studies.language.cells import chosen, loss_of, tuning_runs
from studies.language.frontier import frontier_runs, level, source_at
from studies.language.plan import plan
from studies.language.protocol import GRIDS, METHODS, TARGETS, Base, Run
from studies.language.store import Done
from tests.pages import ROOT, commands

TINY = Base(
    vocabulary=300,
    hidden=32,
    intermediate=64,
    layers=1,
    heads=2,
    window=8,
    block_windows=2,
    validation_windows=4,
    test_windows=4,
    steps=6,
    batch_size=2,
    warmup_steps=2,
    look_every=4,
)
SMALL = {"steps": 2, "batch_size": 2, "validation_windows": 4, "test_windows": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = {"wikitext2": "the {} rivers of the land\n", "python_code": "x = {}  # é\n"}
    for name, line in lines.items():
        (folder / "lm" / name).mkdir(parents=True)
        for file, count in (("train", 200), ("test", 20)):
            text = "".join(line.format(i * i) for i in range(count))
            (folder / "lm" / name / f"{file}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bases.Made:
    folder = tmp_path_factory.mktemp("base")
    bases.make(data, folder, TINY, say=lambda _: None)
    found = bases.find(folder, TINY)
    assert found is not None
    return found


def losses(run: Run) -> tuple[float, float]:
    """Made-up losses of target and source; each method is best at a rate of its own."""
    best = min(GRIDS[run.method]) + len(run.method) % 5 - 1
    away = run.rate_exponent - best
    return 4 + len(run.method) / 100 + abs(away) / 4, 6 + away / 2


def fake(run: Run) -> dict:
    target, source = losses(run)
    found = {"target_validation": target, "source_validation": source, "seconds": 0.0}
    if run.stage == "final":
        found = {"target_test": target + run.seed / 100, "source_test": source, "seconds": 0.0}
        found |= {"target_test_before": 7.0, "source_test_before": 4.0}
    return found


@pytest.fixture(scope="module")
def everything() -> dict[str, Done]:
    done: dict[str, Done] = {}
    while runs := plan(done).runs:
        done |= {run.key: Done(run, fake(run)) for run in runs}
    return done


def test_the_base_is_made_again_to_the_bit_and_only_whole(
    data: Path, made: bases.Made, tmp_path: Path
) -> None:
    result = bases.make(data, tmp_path, TINY, say=lambda _: None)
    again = bases.find(tmp_path, TINY)
    assert again is not None
    assert (again.model_sha256, again.tokenizer_sha256) == (
        made.model_sha256,
        made.tokenizer_sha256,
    )
    kept = min(result["looks"], key=lambda look: look[1])
    assert (result["kept_step"], result["validation_loss"]) == kept
    model = bases.load(again, TINY)
    validation = bases.source(data, again.tokenizer, TINY, validation=4).validation
    assert bases.mean_loss(model, validation) == pytest.approx(kept[1], abs=1e-5)
    assert bases.find(tmp_path, replace(TINY, seed=1)) is None
    with open(tmp_path / bases.MODEL, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert bases.find(tmp_path, TINY) is None


def test_every_method_but_full_trains_equally_many_parameters(data: Path, made: bases.Made) -> None:
    from studies.language.methods import adapt, trained
    from studies.language.protocol import BASE

    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    for method in METHODS:
        run = Run("tuning", "python_code", method, -5, 0)
        model = adapt(bases.new(BASE), run, lambda: [{**batch, "labels": batch["input_ids"]}])
        assert trained(model) == (69632 if method != "full" else 3672320), method


@pytest.mark.parametrize("method", ["full", "lora", "shira-grad"])
def test_a_run_repeats_to_the_last_digit_and_learns(
    data: Path, made: bases.Made, method: str
) -> None:
    from studies.language.train import execute

    run = Run("final", "python_code", method, -4, 1, **SMALL)
    first, second = (execute(run, data, made, TINY) for _ in range(2))
    for timing in ("seconds", "train_seconds"):
        first.pop(timing), second.pop(timing)
    assert first == second
    assert first["source_test"] != first["source_test_before"]
    longer = execute(replace(run, steps=40), data, made, TINY)
    assert longer["target_test"] < first["target_test_before"] - 0.1


def test_a_tuning_run_does_not_need_the_test_texts(
    data: Path, made: bases.Made, tmp_path: Path
) -> None:
    from studies.language.train import execute

    shutil.copytree(data, tmp_path / "data")
    for path in tmp_path.glob("data/lm/*/test.txt"):
        path.unlink()
    run = Run("tuning", "python_code", "shira-random", -4, 1, **SMALL)
    assert "target_test" not in execute(run, tmp_path / "data", made, TINY)
    with pytest.raises(FileNotFoundError):
        execute(replace(run, stage="final"), tmp_path / "data", made, TINY)


def test_validation_windows_are_not_trained_on(data: Path, made: bases.Made) -> None:
    text = texts.training(
        data, "wikitext2", made.tokenizer, window=8, block_windows=2, validation=4
    )
    blocks, held_out = text.blocks.view(-1, 8).tolist(), text.validation.tolist()
    ids = texts._encode(made.tokenizer, texts.read(data, "wikitext2", "train.txt")[0])
    whole = len(ids) // 16 * 2
    assert len(blocks) + len(held_out) == whole
    assert sorted(blocks + held_out) == sorted(ids[: 8 * whole].view(-1, 8).tolist())
    with pytest.raises(ValueError, match="none would be left"):
        texts.training(
            data, "wikitext2", made.tokenizer, window=8, block_windows=2, validation=9999
        )


def test_the_loss_is_that_of_each_token_but_the_first(made: bases.Made) -> None:
    model = bases.load(made, TINY)
    windows = torch.arange(40).view(5, 8)
    log = model(input_ids=windows).logits.detach().log_softmax(dim=-1)[:, :-1]
    expected = -log.gather(2, windows[:, 1:, None]).mean()
    assert bases.mean_loss(model, windows, batch=2) == pytest.approx(float(expected), abs=1e-5)


def test_tuning_goes_beyond_an_edge_and_the_plan_ends(everything: dict[str, Done]) -> None:
    empty = plan({})
    assert not empty.final
    assert not empty.frontier
    assert len(empty.tuning) == len(TARGETS) * sum(map(len, GRIDS.values()))
    assert plan(everything).missing == 0
    for target in TARGETS:
        for method in METHODS:
            assert chosen(everything, target, method) == min(GRIDS[method]) + len(method) % 5 - 1


def test_a_rate_at_which_the_loss_is_not_finite_is_not_chosen(
    everything: dict[str, Done],
) -> None:
    runs = tuning_runs(everything, "python_code", "lora")
    best = chosen(everything, "python_code", "lora")
    spoilt = next(run for run in runs if run.rate_exponent == best)
    lost = Done(spoilt, {"target_validation": None, "source_validation": None})
    assert chosen({**everything, spoilt.key: lost}, "python_code", "lora") != best


def test_what_is_forgotten_is_compared_at_equal_gain(everything: dict[str, Done]) -> None:
    goal = level(everything, "python_code")
    worst = max(METHODS, key=len)
    assert goal == pytest.approx(4 + len(worst) / 100)
    for method in METHODS:
        # Made up so that a method's loss on the source is 6 - 2 * (what it could still gain).
        expected = 6 - 2 * (goal - 4 - len(method) / 100)
        assert source_at(everything, "python_code", method) == pytest.approx(expected), method


def test_lower_rates_are_tried_where_all_are_past_the_level() -> None:
    done: dict[str, Done] = {}
    while runs := plan(done, ["python_code"]).runs:
        for run in runs:
            found = fake(run)
            if run.method == "lora" and run.stage != "final":
                found["target_validation"] -= 0.6
            done[run.key] = Done(run, found)
    lowest = tuning_runs(done, "python_code", "lora")[0]
    extra = [run for run in frontier_runs(done, "python_code") if run.method == "lora"]
    assert [run.rate_exponent for run in extra] == [
        lowest.rate_exponent - 1 - i for i in range(len(extra))
    ]
    assert extra
    goal = level(done, "python_code")
    assert loss_of(done[extra[-1].key]) >= goal > loss_of(done[lowest.key])
    assert source_at(done, "python_code", "lora") is not None
    done.pop(extra[-1].key)
    assert source_at(done, "python_code", "lora") is None
    assert [run.key for run in plan(done, ["python_code"]).runs] == [extra[-1].key]


def record_base(folder: Path, sha256: str) -> None:
    store.append_base({"model_sha256": sha256}, {}, folder)


def test_the_runner_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def execute(made: bases.Made, run: Run, data: Path) -> tuple[dict, dict]:
        nonlocal count
        count += 1
        if count == 40:
            raise KeyboardInterrupt
        return {**fake(run), "base_sha256": "b"}, {}

    monkeypatch.setattr(runner, "_execute", execute)
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr("os.fsync", lambda _: None)
    record_base(tmp_path, "b")
    made = bases.Made(tmp_path, "t", "b")
    go_on = {"jobs": 2, "minutes": None, "results": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        runner.continue_runs(tmp_path, made, ["python_code"], **{**go_on, "jobs": 1})
    assert len(store.load(tmp_path)) == 39
    rest = runner.continue_runs(tmp_path, made, ["python_code"], **go_on)
    assert len(store.load(tmp_path)) == 39 + rest == count - 1
    assert plan(store.load(tmp_path), ["python_code"]).missing == 0


def test_runs_of_another_base_are_refused(tmp_path: Path) -> None:
    run = plan({}).tuning[0]
    record_base(tmp_path, "b")
    store.append(run, {**fake(run), "base_sha256": "b"}, {}, tmp_path)
    assert list(store.load(tmp_path)) == [run.key]
    store.append(replace(run, seed=9), {**fake(run), "base_sha256": "other"}, {}, tmp_path)
    with pytest.raises(ValueError, match="started from a base model"):
        store.load(tmp_path)


def test_a_base_of_other_bits_is_not_gone_on_with(
    tmp_path: Path, made: bases.Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BASE", TINY)
    record_base(tmp_path, made.model_sha256)
    assert runner.ensure_base(tmp_path, made.folder, tmp_path) == made
    (tmp_path / "other").mkdir()
    record_base(tmp_path / "other", "0" * 64)
    with pytest.raises(ValueError, match="is not the one that"):
        runner.ensure_base(tmp_path, made.folder, tmp_path / "other")


def test_tables_fill_only_when_all_runs_are_there(everything: dict[str, Done]) -> None:
    row = next(
        x for x in tables.perplexities(everything, "target").splitlines() if x.startswith("| lora")
    )
    values = [math.exp(4.04 + seed / 100) for seed in (1, 2, 3)]
    assert row.count(f"{sum(values) / 3:.1f} ± {values[1] / 100:.1f}") == len(TARGETS) + 1
    lost = next(key for key, entry in everything.items() if entry.run.stage == "final")
    without = {key: entry for key, entry in everything.items() if key != lost}
    run = everything[lost].run
    assert tables.final_losses(without, run.target, run.method, "source") is None
    assert plan(without).missing == 1
    nothing = [tables.paired({}), tables.rates({}), tables.frontier({}), tables.base(None)]
    assert "±" not in "".join([*nothing, tables.perplexities({}, "source")])


def test_pairs_are_of_one_target_and_seed(everything: dict[str, Done]) -> None:
    differences = tables.paired_differences(everything, "dora", "target")
    assert differences == [[pytest.approx(0.0)] * len(TARGETS)] * 3
    row = next(x for x in tables.paired(everything).splitlines() if x.startswith("| shira-grad"))
    assert "| +0.060 ± 0.000 | 0 / 0 / 9 |" in row


def test_the_page_is_what_the_committed_runs_give(tmp_path: Path) -> None:
    shutil.copy(document.DOCS / "study-language.md", tmp_path)
    document.rebuild(tmp_path)
    written = (tmp_path / "study-language.md").read_text()
    assert written == (document.DOCS / "study-language.md").read_text(), "run `make study`"


def test_the_commands_of_the_page_do_what_it_says() -> None:
    shown = commands(document.DOCS / "study-language.md")
    assert shown == ["make study", "make study RUN=1"]
    for line, end in zip(shown, ("studies.language", "studies.language run"), strict=True):
        command = ["make", "--no-print-directory", "-n", *line.split()[1:]]
        planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert planned.stdout.rstrip().endswith(end)


def test_committed_runs_name_what_they_were_made_with() -> None:
    for path in store.RESULTS.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            assert entry["environment"]["versions"]["torch"]
            assert entry["result"]["seconds"] > 0


def test_absent_texts_are_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "rebuild", lambda: [])
    assert main(["run", "--data", str(tmp_path)]) == 0
    assert "skipped: wikitext2: " in capsys.readouterr().out
