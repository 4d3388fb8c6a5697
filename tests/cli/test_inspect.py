# SPDX-License-Identifier: Apache-2.0
"""`shira inspect`: the tables, the JSON, the base, the errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter, SparseDelta, Support
from shira.base import fingerprint

NAMES = [f"model.layers.{i}.{kind}.weight" for i in range(8) for kind in ("up", "down")]
METADATA = {
    "mask_type": "random",
    "random_seed": 11,
    "mask_slot": 2,
    "base_model_name_or_path": "some/model",
}


@pytest.fixture
def base():
    torch.manual_seed(0)
    return {name: torch.randn(4, 10) for name in NAMES}


@pytest.fixture
def adapter(base):
    """Ten entries a weight; in the first one value is zero and one too small for bfloat16."""
    deltas = {}
    for number, name in enumerate(NAMES):
        support = Support((4, 10), torch.arange(number, number + 20, 2))
        values = torch.linspace(-1.0, 2.0, 10)
        if number == 0:
            values[3], values[4] = 0.0, 1e-7
        deltas[name] = SparseDelta(support, values)
    prints = {
        name: fingerprint(base[name].view(-1)[delta.support.indices])
        for name, delta in deltas.items()
    }
    return Adapter(deltas, {**METADATA, "base_fingerprint": prints})


@pytest.fixture
def saved(adapter, tmp_path):
    adapter.save(tmp_path / "adapter", "peft")
    return tmp_path / "adapter"


@pytest.fixture
def checkpoint(base, tmp_path):
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def test_json_says_everything(shira, saved, adapter):
    answer = shira("inspect", saved, "--json")
    assert (answer.status, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["nnz"] == adapter.nnz == 160
    assert found["density"] == pytest.approx(0.25)
    assert found["parameters"] == len(found["targets"]) == 16
    assert found["dtypes"] == ["float32"]
    assert found["mask"]["mask_type"] == "random"
    assert (found["mask"]["random_seed"], found["mask"]["mask_slot"]) == (11, 2)
    assert found["base"]["recorded"] == "some/model"
    assert found["vanishing_in_bfloat16"] is None
    first = next(t for t in found["targets"] if t["name"] == NAMES[0])
    values = adapter[NAMES[0]].values
    assert first["shape"] == [4, 10]
    assert first["nnz"] == 10
    assert first["values"] == {
        "min": -1.0,
        "max": 2.0,
        "mean_abs": pytest.approx(values.abs().mean().item()),
        "std": pytest.approx(values.std(correction=0).item()),
        "zeros": 1,
    }
    assert first["base_fingerprint"] == adapter.metadata["base_fingerprint"][NAMES[0]]


def test_table_groups_like_weights(shira, saved):
    answer = shira("inspect", saved)
    assert answer.status == 0
    assert answer.out.isascii()
    assert "\x1b" not in answer.out
    assert "model.layers.*.up.weight" in answer.out
    assert "160 in 16 weights, density 25.00%" in answer.out
    assert "random_seed 11" in answer.out
    assert "needs --base" in answer.out
    rows = [line for line in answer.out.splitlines() if "model.layers" in line]
    assert len(rows) == 2
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:6] == ["8", "4 x 10", "80", "25.00%", "float32"]


def test_table_of_each_weight(shira, saved):
    answer = shira("inspect", saved, "--all")
    for name in NAMES:
        assert name in answer.out


def test_base_tells_what_vanishes_and_that_it_is_the_one(shira, saved, checkpoint, adapter, base):
    found = json.loads(shira("inspect", saved, "--json", "--base", checkpoint).out)
    lost = {t["name"]: t["vanishing_in_bfloat16"] for t in found["targets"]}
    for name, delta in adapter.items():
        held = base[name].view(-1)[delta.support.indices].bfloat16()
        same = (held.float() + delta.values).bfloat16() == held
        assert lost[name] == int((same & (delta.values != 0)).sum())
    assert lost[NAMES[0]] == 1
    assert found["vanishing_in_bfloat16"] == sum(lost.values())
    assert found["base"]["targets_unlike"] == []
    table = shira("inspect", saved, "--base", checkpoint / "model.safetensors").out
    assert "is the same base" in table
    assert "needs --base" not in table


def test_another_base_is_named(shira, saved, checkpoint, base, adapter):
    at = int(adapter[NAMES[5]].support.indices[0])
    base[NAMES[5]].view(-1)[at] += 1
    save_file(base, checkpoint / "model.safetensors")
    found = json.loads(shira("inspect", saved, "--json", "--base", checkpoint).out)
    assert found["base"]["targets_unlike"] == [NAMES[5]]
    assert "ANOTHER base" in shira("inspect", saved, "--base", checkpoint).out


def test_stock_files_that_record_no_shapes(shira, saved, checkpoint):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ("shira_shapes", "base_fingerprint"):
        del config[field]
    path.write_text(json.dumps(config))
    found = json.loads(shira("inspect", saved, "--json").out)
    assert (found["nnz"], found["density"]) == (160, None)
    assert found["targets"][0]["shape"] is None
    assert "density needs --base" in shira("inspect", saved).out
    found = json.loads(shira("inspect", saved, "--json", "--base", checkpoint).out)
    assert found["density"] == pytest.approx(0.25)
    assert found["targets"][0]["shape"] == [4, 10]
    assert found["base"]["targets_unlike"] is None


def test_whole_tensors_are_listed(shira, saved):
    path = saved / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.score.weight": torch.ones(2, 4)}, path)
    found = json.loads(shira("inspect", saved, "--json").out)
    assert found["whole_tensors"] == {
        "score.weight": {"shape": [2, 4], "dtype": "float32", "bytes": 32}
    }
    assert "score.weight: 2 x 4, float32" in shira("inspect", saved).out


def test_bfloat16_values(shira, adapter, tmp_path):
    adapter.save(tmp_path / "half", "peft", torch.bfloat16)
    assert json.loads(shira("inspect", tmp_path / "half", "--json").out)["dtypes"] == ["bfloat16"]


def test_errors_are_one_line(shira, saved, tmp_path):
    answer = shira("inspect", tmp_path)
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert "not an adapter" in answer.err
    assert answer.err.count("\n") == 1

    save_file({"model.layers.0.up.weight": torch.ones(4, 10)}, tmp_path / "less.safetensors")
    answer = shira("inspect", saved, "--base", tmp_path / "less.safetensors")
    assert answer.status == 2
    assert "is this its base?" in answer.err

    (saved / "adapter_model.safetensors").write_bytes(b"\x80\x02pickle")
    answer = shira("inspect", saved)
    assert answer.status == 2
    assert "pickle" in answer.err


def test_needs_the_core_alone(saved, checkpoint):
    code = (
        "import sys\n"
        "from shira.cli import main\n"
        f"try: main(['inspect', {str(saved)!r}, '--base', {str(checkpoint)!r}])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('MODULES', *sys.modules)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    loaded = {name.partition(".")[0] for name in out.partition("MODULES")[2].split()}
    assert not {"peft", "transformers", "accelerate", "huggingface_hub"} & loaded


def test_a_compact_file(shira, adapter, tmp_path):
    path = tmp_path / "adapter.safetensors"
    adapter.save(path, dtype=torch.int8, indices="gaps")
    found = json.loads(shira("inspect", path, "--json").out)
    assert found["format"] == "compact"
    assert found["written_by"].startswith("shira ")
    assert (found["nnz"], found["dtypes"]) == (160, ["int8"])
    assert found["file_bytes"] == path.stat().st_size
    assert {target["indices"] for target in found["targets"]} == {"gaps"}
    assert found["config"]["base_model_name_or_path"] == "some/model"
    assert found["targets"][0]["base_fingerprint"] is not None
    said = shira("inspect", path).out
    assert "compact" in said
    assert "gaps (16 weights)" in said
    assert json.loads(shira("inspect", tmp_path, "--json").out)["nnz"] == 160
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    answer = shira("inspect", path)
    assert answer.status == 2
    assert "out of range" in answer.err


@pytest.mark.parametrize("options", [[], ["--all"]])
def test_plot(shira, saved, tmp_path, options):
    picture = tmp_path / "adapter.png"
    answer = shira("inspect", saved, "--plot", picture, *options)
    assert answer.status == 0
    assert str(picture) in answer.out
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width > 400
    assert height > 400


def test_plot_needs_shapes_and_a_folder(shira, saved, tmp_path):
    answer = shira("inspect", saved, "--plot", tmp_path / "absent" / "a.png")
    assert answer.status == 2
    assert "there is no folder" in answer.err
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["shira_shapes"]
    path.write_text(json.dumps(config))
    answer = shira("inspect", saved, "--plot", tmp_path / "a.png")
    assert answer.status == 2
    assert "--base" in answer.err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("value", [1.7976931348623157e308, 2.3e-308, 5e-324, 0.0])
def test_values_at_the_ends_of_float64(shira, tmp_path, value):
    """Their squares are infinite or zero, and axes of matplotlib end in an error."""
    support = Support((4, 10), torch.arange(3))
    values = torch.tensor([value, -value, 0.0], dtype=torch.float64)
    Adapter({"w.weight": SparseDelta(support, values)}).save(tmp_path / "a", "compact")
    answer = shira("inspect", tmp_path / "a", "--json", "--plot", tmp_path / "a.png")
    assert (answer.status, answer.err) == (0, "")
    found = json.loads(answer.out, parse_constant=pytest.fail)["values"]
    assert found == {
        "min": -value,
        "max": value,
        "mean_abs": pytest.approx(2 / 3 * value, rel=1e-12, abs=5e-324),
        "std": pytest.approx((2 / 3) ** 0.5 * value, rel=1e-12, abs=5e-324),
        "zeros": 3 if value == 0 else 1,
    }
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert shira("inspect", tmp_path / "a").status == 0
