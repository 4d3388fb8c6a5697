# SPDX-License-Identifier: Apache-2.0
"""The gpu suite at its smallest, on whatever device there is; as a command it needs a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    gpu,
    gpu_adapters,
    gpu_answers,
    gpu_contenders,
    gpu_expected,
    gpu_session,
    report,
)
from benchmarks.panels import PANELS

TINY = gpu.Settings(
    layers=1,
    hidden=64,
    intermediate=96,
    heads=2,
    kv_heads=1,
    vocab=64,
    batch=1,
    tokens=16,
    r=2,
    repeats=2,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(tmp_path: Path, dtype: str) -> None:
    *_, result = gpu.parts(replace(TINY, dtype=dtype), device=DEVICE)
    assert result["failed"] == {}
    report.write(result, tmp_path / "gpu.json")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["settings"]["device"] == DEVICE
    for which in ("qv", "all"):
        answers, rows = written["answers"][which], written["results"][which]
        assert answers["merged_equals_unmerged"] is True
        assert answers["base_weights_unchanged"] is True
        assert {
            "shira against peft-shira",
            "shira-block against shira-block-chunked",
        } < set(answers["exact"]["differences"])
        assert {"floor", "shira", "shira-block", "peft-shira", "peft-lora"} <= set(rows)
        assert len({row["trained"] for name, row in rows.items() if name != "floor"}) == 1
        assert rows["floor"]["wall_ratio"]["median"] == 1
        assert {"floor", "shira", "shira-block"} <= {n for n in rows if rows[n]["expected_seconds"]}
        for row in rows.values():
            assert len(row["wall_seconds"]["samples"]) == 2
            assert (row["memory_bytes"] is None) == (DEVICE == "cpu")
    # q and v share one input of 16 tokens; o, the MLP's two and its last layer have their own
    size = 4 if dtype == "float32" else 2
    assert written["answers"]["qv"]["saved_inputs_bytes"] == 16 * 64 * size
    assert written["answers"]["all"]["saved_inputs_bytes"] == 16 * (3 * 64 + 96) * size
    assert set(written["kernels"]) == {"64x64", "96x64", "64x96"}
    assert written["kernels"]["96x64"]["dense"]["over_dense"]["median"] == 1
    assert [list(panel.bars or ()) for panel in PANELS["gpu"](written)] == [
        list(rows) for rows in written["results"].values()
    ]
    tables = gpu.tables(written)
    assert len(tables) == 3
    for table in tables:
        table.print()


def test_switching_masks_and_mixed_batches(tmp_path: Path) -> None:
    shape = {"layers": 2, "hidden": 64, "intermediate": 96, "heads": 2, "kv_heads": 1}
    tiny = gpu_adapters.Settings(
        **shape, vocab=64, size=128, r=2, mixed_layers=1, cases="4x1x2,4x3x1", repeats=2
    )
    *_, result = gpu_adapters.parts(tiny, device=DEVICE)
    assert result["failed"] == {}
    report.write(result, tmp_path / "gpu_adapters.json")
    assert len(result["results"]) == 6
    for part in ("switching, one weight", "switching, all layers"):
        assert result["answers"][part]["base_came_back_bit_for_bit"]["Switch"]
        assert not result["answers"][part]["base_came_back_bit_for_bit"]["PEFT SHiRA"]
    assert set(result["results"]["mixed batch, 4x1x2"]) == {"base", "shira", "PEFT LoRA"}
    for table in gpu_adapters.tables(result):
        table.print()
    assert len(PANELS["gpu_adapters"](result)) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_compare", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert command.main(["gpu"]) == 1
    assert "not measured" in capsys.readouterr().out
    monkeypatch.setattr(command, "SUITES", {"gpu": gpu})
    assert command.main([]) == 0  # among all suites it is passed over
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        gpu.run(TINY)


def contenders_of(which: str = "qv"):
    base = gpu_contenders.base_model(TINY.shape(), TINY.tokens, DEVICE, torch.float32)
    makers = gpu_contenders.makers(base, gpu_contenders.TARGETS[which], TINY.r, [])
    inputs = gpu_contenders.batch(TINY.shape(), 1, TINY.tokens, DEVICE, torch.float32)
    field = {name: gpu_contenders.build(name, maker, base) for name, maker in makers.items()}
    return base, field, inputs


def test_contenders_share_the_memory_of_one_base() -> None:
    base, field, _ = contenders_of()
    weights = {p.data_ptr() for p in base.parameters()}
    for contender in field.values():
        frozen = [p for p in contender.model.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == weights


def spoil(contender: gpu_contenders.Contender) -> None:
    layer = next(m for m in contender.model.modules() if hasattr(m, "shira_weight"))
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight * 1.5, False)


def test_contenders_that_disagree_are_found_out() -> None:
    _, field, inputs = contenders_of()
    spoil(field["peft-shira"])
    with pytest.raises(RuntimeError, match="answers differ"):
        gpu_answers.compare(field, inputs)
    _, field, inputs = contenders_of()
    spoil(field["shira"])
    with pytest.raises(RuntimeError, match="untrained adapter changes"):
        gpu_answers.check_bits(field, inputs)


def test_a_merge_that_differs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, field, inputs = contenders_of()
    monkeypatch.setattr(field["shira"].model, "merge_adapter", partial(spoil, field["shira"]))
    with pytest.raises(RuntimeError, match="merged and unmerged"):
        gpu_answers.check_bits(field, inputs)


def test_a_part_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(shape, targets, *others):
        if targets == gpu_contenders.TARGETS["qv"]:
            raise RuntimeError("wrong answers")
        return {}

    monkeypatch.setattr(gpu_answers, "check_exactly", check)
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setattr(gpu, "parts", partial(gpu.parts, device=DEVICE))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(TINY).items()]
    output = tmp_path / "gpu.json"
    assert command.main(["gpu", *options, f"--output={output}"]) == 1
    written = json.loads(output.read_text())
    assert list(written["failed"]) == ["answers, targets qv", "steps, targets qv"]
    assert list(written["results"]) == ["all"]
    assert len(written["kernels"]) == 3
    assert "wrong answers" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="parts of the gpu suite failed"):
        gpu.run(TINY, device=DEVICE)


def test_the_page_has_what_is_counted() -> None:
    page = (gpu_session.ROOT / "docs" / "gpu.md").read_text()
    assert gpu_expected.markdown() in page


def test_counts_by_hand() -> None:
    tokens, rows, cols, r = 2048, 3072, 3072, 32
    (dense,) = gpu_expected.gradient("dense", tokens, rows, cols, r)
    assert dense.operations == 2 * 2048 * 3072 * 3072
    assert dense.bytes == 2 * (2 * 2048 * 3072 + 3072 * 3072)
    assert dense.seconds == dense.operations / 790e12  # more than its bytes take
    k = 32 * 6144
    *_, gather, cast = gpu_expected.gradient("random, chunked, 64 MiB", tokens, rows, cols, r)
    assert gather.bytes == (8 + 32 + 2) * k
    assert cast.seconds == 3e-6  # a launch
    blocks = gpu_expected.gradient("block, as chosen", tokens, rows, cols, r)
    assert max(kernel.operations for kernel in blocks) == 2 * 2048 * k
    found = gpu_expected.steps(gpu_contenders.Shape(), "all", 32, 4, 512)
    assert set(found) == {"floor", *gpu_expected.LAYERS}
    # 2.82 billion weights of layers and 0.39 of the head, twice
    assert found["floor"] > 2 * 2 * 2048 * 3.2e9 / 790e12
    assert found["floor"] < found["shira-block"] < found["shira"]


def test_one_changed_entry_of_the_base_shows() -> None:
    base, _, _ = contenders_of()
    before = gpu.bits(base)
    with torch.no_grad():
        weight = next(base.parameters()).view(-1)
        weight[3] = torch.nextafter(weight[3], weight.new_tensor(9.0))
    assert gpu.bits(base) != before
