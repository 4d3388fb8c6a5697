# SPDX-License-Identifier: Apache-2.0
"""The benchmarks at their smallest: they run, check their answers and write what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    chain,
    contenders,
    figures,
    memory,
    merging,
    policy,
    serving,
    serving_models,
    switching,
    timing,
    training,
)
from benchmarks.__main__ import main
from benchmarks.panels import PANELS, Bar

TINY = training.Settings(layers=1, hidden=64, heads=2, vocab=64, batch=1, tokens=16, repeats=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "training.json"
    size = "--layers 1 --hidden 64 --heads 2 --vocab 64 --batch 1 --tokens 16 --repeats 2"
    assert main(["training", *size.split(), "--no-memory", "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_document_has_hardware_versions_settings(written: dict) -> None:
    assert written["suite"] == "training"
    assert written["date"].endswith("Z")
    assert written["environment"]["cores"] >= 1
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert written["settings"]["layers"] == 1
    assert written["settings"]["intermediate"] == 176
    assert written["settings"]["density_reached"] == pytest.approx(
        written["results"]["shira"]["trained"] / (4 * 64 * 64 + 3 * 64 * 176), rel=1e-5
    )


def test_every_contender_is_timed_against_the_floor(written: dict) -> None:
    assert set(written["results"]) == set(contenders.DEFAULT)
    trained = {name: row["trained"] for name, row in written["results"].items()}
    assert trained.pop("floor") == 0
    assert len(set(trained.values())) == 1
    for row in written["results"].values():
        assert len(row["wall_seconds"]["samples"]) == 2
        assert set(row["phase_wall_seconds"]) == {"forward", "backward", "optimizer"}
        assert row["memory_bytes"] is None
        ratio = row["wall_ratio"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert written["results"]["floor"]["wall_ratio"]["of_min"] == 1


def test_answers_were_compared_and_agree(written: dict) -> None:
    answers = written["answers"]
    for name in training.COMPARED:
        assert answers[name] <= answers["tolerance"]
    assert answers["values_move_logits_by"] > 10 * answers["tolerance"]
    assert answers["base_weights_equal_bit_for_bit"] is True


@pytest.mark.parametrize("spoilt", ["shira", "peft-shira", "peft-lora"])
def test_a_wrong_contender_is_not_timed(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = contenders.BUILDERS[spoilt]

    def wrong(model: torch.nn.Module, work: contenders.Workload) -> torch.nn.Module:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        return build(model, work)

    monkeypatch.setitem(contenders.BUILDERS, spoilt, wrong)
    work = TINY.workload()
    with pytest.raises(RuntimeError, match="answers differ"):
        training.check_answers(contenders.build_all(work), contenders.batch(work))


def test_a_changed_base_is_noticed() -> None:
    field = contenders.build_all(TINY.workload())
    assert training.check_base(field)
    with torch.no_grad():
        contenders.base_weights(field["shira"])[3].view(-1)[0] += 1
    with pytest.raises(RuntimeError, match="changed the base weights of shira"):
        training.check_base(field)


def test_kernel_suite(tmp_path: Path) -> None:
    path = tmp_path / "kernel.json"
    assert main(["kernel", "--shapes", "96x64", "--repeats", "2", "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    (panel,) = PANELS["kernel"](written)
    assert panel.bars is not None
    assert {"products", "native", "tiles"} <= panel.bars.keys()
    assert written["answers"]["largest_error"] <= written["answers"]["tolerance"]
    row = written["results"]["96x64"]
    assert row["k"] == round(0.02 * 96 * 64)
    assert row["roofline_seconds"] > 0
    assert 5e-324 > 0  # measuring leaves the processor's handling of subnormal numbers alone
    assert torch.tensor([1e-40]).mul(0.5).item() > 0


def test_growth_suite(tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    axes = "--density 0.02 --tokens 16,32 --width 128 --depth 1 --middle 0.02,16,128,1 --repeats 2"
    assert main(["growth", *axes.split(), "--output", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert figures.draw(PANELS["growth"]({"results": results})).count(b'<g id="axes_') == 8
    assert set(results) == {"density", "tokens", "width", "depth"}
    few, many = results["tokens"]["16"], results["tokens"]["32"]
    assert set(few) == {"floor", "shira", "shira-block", "peft-shira", "peft-lora", "full"}
    assert all(many[name]["peak_bytes"] > few[name]["peak_bytes"] for name in few)
    assert all(0 < row["activation_bytes"] <= row["peak_bytes"] for row in few.values())


def test_masks_suite(tmp_path: Path) -> None:
    path = tmp_path / "masks.json"
    size = "--shapes 64x48 --r 2 --repeats 2 --blocks 2 --hidden 32 --intermediate 64"
    assert main(["masks", *size.split(), "--model-repeats", "1", "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["answers"]["entries_are_k_distinct"] is True
    assert written["answers"]["repeatable"] is True
    assert written["results"]["layers"]["64x48"]["k"] == 2 * (64 + 48)
    model = written["results"]["model"]
    assert model["parameters"] == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert model["whole_wall_seconds"]["get_peft_model"]["min"] > 0
    assert model["one_block"]["shira_over_peft"]["median"] > 0


def test_merging_suite(tmp_path: Path) -> None:
    path = tmp_path / "merging.json"
    size = "--hidden 64 --intermediate 96 --layers 2 --vocab 64 --shard 40KB --repeats 1"
    assert (
        main(
            [
                "merging",
                *size.split(),
                "--no-memory",
                "--folder",
                str(tmp_path),
                "--output",
                str(path),
            ]
        )
        == 0
    )
    written = json.loads(path.read_text())
    about = written["results"]["checkpoint"]
    assert about["shards"] > 2
    assert about["adapter_entries"] == 2 * (4 * round(0.02 * 64 * 64) + 3 * round(0.02 * 64 * 96))
    assert written["answers"]["merged_tensors_equal_bit_for_bit"] == 21
    assert set(written["results"]["contenders"]) == set(merging.CONTENDERS)
    assert all(row["seconds"]["min"] > 0 for row in written["results"]["contenders"].values())
    assert [file.name for file in tmp_path.iterdir()] == ["merging.json"]  # nothing is left


@pytest.mark.skipif(bool(chain.unavailable()), reason="forks")
def test_chain_suite(tmp_path: Path) -> None:
    path = tmp_path / "chain.json"
    size = "--megabytes 2 --rates 1e-6,1e-5 --links 12 --kills 3"
    assert main(["chain", *size.split(), "--folder", str(tmp_path), "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    few, many = written["results"]["steps"].values()
    assert few["changed_share"] < many["changed_share"]
    for row in (few, many):
        each = row["bytes_a_changed_entry"]
        assert each["link"] < 1.6 < each["xor, deflated"]
    held = written["results"]["chain"]
    assert (held["links"], held["killed"]) == (12, 3)
    assert held["equal_at_each_tenth"] is True
    assert [file.name for file in tmp_path.iterdir()] == ["chain.json"]  # nothing is left
    assert figures.draw(PANELS["chain"](written)).count(b'<g id="axes_') == 1


@pytest.mark.skipif(switching.unavailable() is not None, reason="needs the compiled kernels")
def test_switching_suite(tmp_path: Path) -> None:
    path = tmp_path / "switching.json"
    size = "--shape 64x48 --r 2 --repeats 2 --blocks 1 --hidden 32 --intermediate 64"
    drift = "--drift-size 32 --drift-switches 30 --model-repeats 1"
    assert main(["switching", *size.split(), *drift.split(), "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    back = written["answers"]["base_came_back_bit_for_bit"]
    assert back["shira"] is back["shira_in_peft"] is True
    assert back["peft_shira"] is back["peft_lora"] is False
    layer = written["results"]["layer"]
    assert layer["entries"] == 2 * (64 + 48)
    assert layer["there_and_back"]["shira"]["ratio"]["median"] == 1
    assert set(layer["against_the_limit"]) == {"there_and_back", "onwards"}
    model = written["results"]["model"]
    assert model["weights"] == 7
    assert model["parameters"] == 2 * 32 * 32 + 2 * 8 * 32 + 3 * 32 * 64
    assert all(seconds > 0 for seconds in model["peft_seconds"].values())
    for row in written["results"]["drift"].values():
        assert row["changed_by_shira"] == 0
        assert 0 < row["changed_by_peft"] <= row["entries_touched"]


@pytest.mark.skipif(switching.unavailable() is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("spoilt", ["shira_in_peft", "peft_shira", "peft_lora"])
def test_a_wrong_switch_is_not_timed(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = getattr(switching, spoilt)

    def wrong(linear, *args):
        layer = build(linear, *args)
        if spoilt == "peft_lora":
            layer.scaling["default"] = 0.0
        else:
            layer.shira_weight["default"].data.mul_(30)
        return layer

    monkeypatch.setattr(switching, spoilt, wrong)
    settings = switching.Settings(shape="32x32", r=2, repeats=1, blocks=0, drift_switches=0)
    with pytest.raises(RuntimeError, match="answers differ"):
        switching.run(settings, lambda text: None)


def test_allocator_peak_counts_what_is_alive_together() -> None:
    def work() -> None:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first + 1  # and 4 more
        del first
        torch.ones(1 << 18), second  # and 1, after 4 are gone

    assert memory.allocator_peak(work) == pytest.approx(8 << 20, rel=0.01)


@pytest.mark.skipif(memory.settled_rss() is None, reason="the system keeps no resettable peak")
def test_resident_peak_sees_what_was_freed_again() -> None:
    start = memory.settled_rss()
    block = torch.ones(16 << 20)  # 64 MiB
    del block
    torch.ones(1 << 10)
    assert 62 << 20 < memory._peak_rss() - start < 80 << 20


def test_memory_of_a_contender_in_its_own_process() -> None:
    figures = memory.measure_apart("floor", TINY.workload())
    assert figures["allocator"]["step"] > 0
    assert set(figures["rss"]) == {"resident", "step", "over_base"}


def test_ratios_are_taken_within_a_round() -> None:
    # A machine ten times slower in the second round: the paired ratio is still 2 everywhere.
    ratio = timing.ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert set(ratio) == {"of_min", "median", "q1", "q3", "low", "high"}
    assert set(ratio.values()) == {2.0}


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # The ranks of the tables for the sign test at 5 %, counted from 1.
    [(1, 1, 1), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (20, 6, 15), (25, 8, 18)],
)
def test_what_a_median_is_known_to(count: int, low: int, high: int) -> None:
    samples = [float(n) for n in range(count, 0, -1)]
    assert timing.median_interval(samples) == (low, high)


def test_each_contender_stands_between_two_runs_of_the_reference() -> None:
    # A machine that grows slower at a steady pace: every ratio is what it would be at one speed.
    clock = 0.0

    def runner(cost: float):
        def run() -> timing.Laps:
            nonlocal clock
            clock += 1.0
            laps = timing.Laps()
            laps.phases["work"] = timing.Lap(cost * clock, 2 * cost * clock)
            return laps

        return run

    kept, beside = timing.flank({"floor": runner(1.0), "other": runner(3.0)}, "floor", 4)
    for name, cost in (("floor", 1.0), ("other", 3.0)):
        pairs = [(a.total, b) for a, b in zip(kept[name], beside[name], strict=True)]
        assert len(pairs) == 4
        assert all(a.wall == cost * b.wall and a.cpu == 2 * cost * b.wall for a, b in pairs)


def test_contenders_take_turns_in_a_changing_order() -> None:
    order: list[str] = []

    def runner(name: str):
        def run() -> timing.Laps:
            order.append(name)
            return timing.Laps()

        return run

    kept = timing.interleave({name: runner(name) for name in "abc"}, 3, warmup=1)
    assert order == list("cab" + "abc" + "bca" + "cab")
    assert [len(kept[name]) for name in "abc"] == [3, 3, 3]


def test_mixed_batch_suite(tmp_path: Path) -> None:
    path = tmp_path / "mixed_batch.json"
    size = "--layers 1 --hidden 64 --heads 2 --vocab 64 --repeats 2 --cases 5x1x2,4x3x1"
    assert main(["mixed_batch", *size.split(), "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert set(written["results"]) == {"5x1x2", "4x3x1"}
    for case, rows in written["results"].items():
        assert set(rows) == {"floor", "grouped", "whole", "shira", "peft-lora"}
        assert rows["grouped"]["wall_ratio"]["median"] > 0
        assert written["answers"][case]["grouped"] <= written["answers"][case]["tolerance"]


@pytest.mark.parametrize("suite", [serving, policy])
def test_suites_of_a_server_say_why_they_cannot_run_here(suite: Any) -> None:
    pytest.importorskip("transformers")
    why = suite.unavailable()
    if why is None:
        pytest.skip("vLLM is installed")
    assert "make test-vllm" in why
    with pytest.raises(RuntimeError, match="vLLM"):
        suite.run(suite.Settings())


def test_panels_of_the_policy_suite() -> None:
    spread = {"median": 0.2, "q1": 0.1, "q3": 0.3}
    row = {"bytes": 8, "update": spread, "pause": spread, "token": spread, "token_ratio": spread}
    result = {"settings": vars(policy.Settings()), "results": {"lora": row, "shira": row}}
    until, token = PANELS["policy"](result)
    assert until.bars == dict.fromkeys(("lora", "shira"), Bar(200, 100, 300))
    assert token.bars == dict.fromkeys(("lora", "shira"), Bar(0.2, 0.1, 0.3))
    (table,) = policy.tables(result)
    assert table.rows[1] == ["shira", "8", "200", "200", "200.0", "0.20 [0.10, 0.30]"]


def test_loads_of_the_serving_suite() -> None:
    assert set(serving._wanted("one", 8)) == {"one"}
    assert serving._wanted("runs", 8) == [n for n in ("base", "one", "two", "three") for _ in "ab"]
    mixed = serving._wanted("mixed", 200)
    assert mixed == serving._wanted("mixed", 200)
    assert all(30 < mixed.count(name) < 70 for name in ("base", "one", "two", "three"))


def test_models_of_the_serving_suite(tmp_path: Path) -> None:
    base = serving_models.save_base(tmp_path / "b", hidden=64, layers=1, vocab=50, length=32)
    assert len(serving_models.targets(base)) == 7
    merged = serving_models.save_shira(tmp_path / "s", base, r=2, seed=1)
    serving_models.save_lora(tmp_path / "l", base, r=2, seed=1)
    prompts = [[3, 4, 5], [6, 7, 8]]
    plain = serving_models.greedy(base, {}, prompts, 6)
    assert [len(answer) for answer in plain] == [6, 6]
    assert serving_models.greedy(base, merged, prompts, 6) != plain
