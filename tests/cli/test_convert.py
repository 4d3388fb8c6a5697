# SPDX-License-Identifier: Apache-2.0
"""`shira merge`, `unmerge`, `extract` and `convert`: files, figures, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter, SparseDelta, Support
from shira.convert import load_patches
from shira.store import FORMATS
from tests.convert.conftest import applied, digests, load, make_adapter, write_checkpoint

SHAPES = {"layers.0.up.weight": (12, 8), "layers.1.up.weight": (12, 8), "head.weight": (4, 8)}
SHARDS = {"a.safetensors": [*SHAPES][:1], "b.safetensors": [*SHAPES][1:]}
COMPACT = pytest.mark.skipif("compact" not in FORMATS, reason="no compact format")


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}


@pytest.fixture
def base(tensors, tmp_path):
    return write_checkpoint(tmp_path / "base", tensors, SHARDS)


@pytest.fixture
def adapter(tensors):
    made = make_adapter(tensors, [*SHAPES][:2])
    made["layers.0.up.weight"].values[:3] = 1e-6  # lost in bfloat16
    return made


@pytest.fixture
def saved(adapter, tmp_path):
    adapter.save(tmp_path / "adapter", format="peft")
    return tmp_path / "adapter"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_merge_and_unmerge(shira, base, saved, tensors, adapter, tmp_path):
    answer = shira("merge", saved, "--base", base, "--output", tmp_path / "out",
                   "--undo", tmp_path / "undo")  # fmt: skip
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.isascii()
    assert same(load(tmp_path / "out"), applied(tensors, adapter))
    assert "20 in 2 weights" in answer.out
    assert "3 of 20 deltas other than zero (15.0%)" in answer.out
    assert "2 same" in answer.out
    assert "2 patched" in answer.out
    row = next(line for line in answer.out.splitlines() if "layers.0.up" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["layers.0.up.weight", "bfloat16", "10", "3", "30.0%", "same"]

    answer = shira("unmerge", tmp_path / "out", "--undo", tmp_path / "undo",
                   "--output", tmp_path / "back")  # fmt: skip
    assert (answer.status, answer.err) == (0, "")
    assert "17 entries in 2 weights" in answer.out
    assert digests(tmp_path / "back") == digests(base)


def test_merge_as_json(shira, base, saved, tensors, adapter, tmp_path):
    options = ["--base", base, "--output", tmp_path / "out", "--scale", "0.5", "--json"]
    answer = shira("merge", saved, *options, "--undo", tmp_path / "undo")
    assert answer.status == 0
    found = json.loads(answer.out)
    assert (found["nnz"], found["nonzero"]) == (20, 20)
    assert found["lost_to_rounding"] == sum(t["lost"] for t in found["targets"]) >= 3
    assert found["files"]["patched"] == ["a.safetensors", "b.safetensors"]
    assert found["targets"][0]["base"] == "same"
    assert same(load(tmp_path / "out"), applied(tensors, adapter, 0.5))
    back = ["--undo", tmp_path / "undo", "--output", tmp_path / "back", "--json"]
    found = json.loads(shira("unmerge", tmp_path / "out", *back).out)
    assert found["tensors"] == 2
    assert found["output"] == str(tmp_path / "back")


def refused(answer, match):
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert match in answer.err


def test_merge_refuses_in_one_line(shira, base, saved, tensors, tmp_path):
    into = ["--base", base, "--output"]
    refused(shira("merge", saved, *into, base), "is read here")
    refused(
        shira("merge", saved, *into, tmp_path / "o", "--max-lost", "0.1"), "rounding swallows 3"
    )
    refused(shira("merge", tmp_path / "no", *into, tmp_path / "o"), "no such file or folder")
    refused(
        shira("merge", saved, "--base", "no/such", "--output", tmp_path / "o"), "the hub did not"
    )
    refused(
        shira("merge", saved, "--base", "./no", "--output", tmp_path / "o"),
        "./no: no such file or folder",
    )
    assert shira("merge", saved, *into, tmp_path / "o").status == 0
    refused(shira("merge", saved, *into, tmp_path / "o"), "exists; overwrite it (--overwrite)")
    assert shira("merge", saved, *into, tmp_path / "o", "--overwrite").status == 0
    tensors["layers.0.up.weight"] += 1
    save_file({"layers.0.up.weight": tensors["layers.0.up.weight"]}, base / "a.safetensors")
    refused(shira("merge", saved, *into, tmp_path / "p"), "wrong base")
    assert shira("merge", saved, *into, tmp_path / "p", "--no-check-base").status == 0


def test_a_full_disk_is_one_line(shira, base, saved, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shira.checkpoints.entries.copy_file", full)
    refused(shira("merge", saved, "--base", base, "--output", tmp_path / "o"), "No space left")
    assert not (tmp_path / "o").exists()


def test_extract_exactly(shira, base, saved, tensors, adapter, tmp_path):
    shira("merge", saved, "--base", base, "--output", tmp_path / "tuned")
    arguments = [
        "extract",
        base,
        tmp_path / "tuned",
        "--output",
        tmp_path / "found",
        "--to",
        "peft",
    ]
    answer = shira(*arguments)
    assert (answer.status, answer.err) == (0, "")
    assert "bit for bit" in answer.out
    assert "100.0000% of the squared difference" in answer.out
    found = Adapter.load(tmp_path / "found")
    assert found.nnz == 17
    assert same(applied(tensors, found), applied(tensors, adapter))
    refused(shira(*arguments), "exists; overwrite it")
    answer = shira(*arguments, "--overwrite", "--dtype", "bfloat16", "--json")
    told = json.loads(answer.out)
    assert (answer.status, told["nnz"], told["energy_share"]) == (0, 17, 1.0)
    assert told["exact"] is same(
        applied(tensors, Adapter.load(tmp_path / "found")), applied(tensors, adapter)
    )


def test_extract_within_a_budget(shira, base, tensors, tmp_path):
    torch.manual_seed(1)
    full = {n: (t + torch.randn(t.shape)).bfloat16() for n, t in tensors.items()}
    tuned = write_checkpoint(tmp_path / "tuned", full, SHARDS)
    to = ["--output", tmp_path / "found", "--to", "peft"]
    refused(shira("extract", base, tuned, *to), "Give a budget")
    budget = ["--density", "0.25", "--include", "layers.*", "--exclude", "*.1.*"]
    told = json.loads(shira("extract", base, tuned, *to, *budget, "--json").out)
    assert (told["nnz"], told["exact"]) == (24, False)
    assert 0.25 < told["energy_share"] < 1
    assert sorted(told["excluded"]) == ["head.weight", "layers.1.up.weight"]
    answer = shira("extract", base, tuned, *to, "--r", "1", "--everywhere", "--overwrite")
    assert answer.status == 0
    assert "exact" in answer.out
    refused(shira("extract", base, tuned, "--output", tmp_path / "x", "--to", "pefd"),
            "Did you mean 'peft'")  # fmt: skip
    options = ["--output", tmp_path / "x", "--to", "peft", "--dtype", "bf16"]
    refused(shira("extract", base, tuned, *options), "--dtype is one of")


def test_extract_says_with_its_status_that_it_is_not_exact(shira, tmp_path):
    save_file({"w.weight": torch.ones(2, 2)}, tmp_path / "base.safetensors")
    tuned = torch.tensor([[1.0, 1e-20], [1.0, 1.0]])  # no float64 delta goes there
    save_file({"w.weight": tuned}, tmp_path / "tuned.safetensors")
    arguments = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "--to", "peft"]
    answer = shira("extract", *arguments, "--output", tmp_path / "found")
    assert answer.status == 1
    assert "1 entries, which no float64 delta" in answer.out
    budget = ["--output", tmp_path / "found", "--overwrite", "--density", "0.5"]
    assert shira("extract", *arguments, *budget).status == 0


@COMPACT
def test_convert_between_formats(shira, saved, adapter, tmp_path):
    small, back = tmp_path / "small.safetensors", tmp_path / "back"
    answer = shira("convert", saved, "--output", small)
    assert (answer.status, answer.err) == (0, "")
    assert "bytes an entry" in answer.out
    told = json.loads(shira("convert", small, "--to", "peft", "--output", back, "--json").out)
    assert (told["format"], told["nnz"], told["parameters"]) == ("peft", 20, 2)
    assert Adapter.load(small) == Adapter.load(back) == adapter
    half = shira("convert", saved, "--output", small, "--overwrite", "--dtype", "bfloat16")
    assert half.status == 0
    assert all(d.values.dtype == torch.bfloat16 for d in Adapter.load(small).values())


def test_whole_tensors_come_along(shira, saved, base, tmp_path):
    """Through every format and into a checkpoint; to a patch they are refused."""
    path = saved / "adapter_model.safetensors"
    head = torch.full((4, 8), 0.3)
    save_file({**load_file(path), "base_model.model.head.weight": head}, path)
    small, back, merged = (tmp_path / name for name in ("small.safetensors", "back", "merged"))
    answer = shira("convert", saved, "--output", small)
    assert "whole head.weight" in answer.out
    told = json.loads(shira("convert", small, "--to", "peft", "--output", back, "--json").out)
    assert told["whole_tensors"] == ["head.weight"]
    assert torch.equal(Adapter.load(back).tensors["head.weight"], head)
    answer = shira("merge", back, "--base", base, "--output", merged)
    assert "Whole tensors" in answer.out
    held = load_file(merged / "b.safetensors")["head.weight"]
    assert torch.equal(held, head.to(held.dtype))
    patch = ["convert", small, "--to", "patch", "--base", base, "--output", tmp_path / "patch"]
    refused(shira(*patch), "'head.weight'")


def test_convert_stock_files_with_the_base(shira, saved, base, adapter, tmp_path):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["shira_shapes"], config["base_fingerprint"]
    path.write_text(json.dumps(config))
    arguments = ["convert", saved, "--to", "peft", "--output", tmp_path / "o"]
    refused(shira(*arguments), "does not record the shapes")
    assert shira(*arguments, "--base", base).status == 0
    assert Adapter.load(tmp_path / "o") == adapter


def test_convert_to_a_patch(shira, saved, base, tensors, adapter, tmp_path):
    arguments = ["convert", saved, "--to", "patch", "--output", tmp_path / "patch"]
    refused(shira(*arguments), "it needs --base")
    refused(shira(*arguments, "--base", base, "--dtype", "float32"), "--dtype is not for it")
    assert shira(*arguments, "--base", base, "--scale", "2").status == 0
    wanted = applied(tensors, adapter, 2.0)
    for patch in load_patches(tmp_path / "patch"):
        there = wanted[patch.name].view(-1)[patch.indices.long()]
        assert torch.equal(patch.values, there)


@pytest.fixture
def lora(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "lora"
    folder.mkdir()
    key = "base_model.model.layers.0.up"
    save_file(
        {f"{key}.lora_A.weight": torch.randn(2, 8), f"{key}.lora_B.weight": torch.randn(12, 2)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_convert_a_lora(shira, lora, base, tmp_path):
    arguments = ["convert", lora, "--to", "peft", "--output", tmp_path / "o"]
    answer = shira(*arguments)
    assert (answer.status, answer.err) == (0, "")
    assert "of the squared update" in answer.out
    assert Adapter.load(tmp_path / "o").nnz == 2 * (12 + 8)
    budget = ["--density", "0.5", "--base", base, "--overwrite", "--json"]
    told = json.loads(shira(*arguments, *budget).out)
    assert told["nnz"] == told["weights"][0]["kept"] == 48
    assert 0.5 < told["energy_share"] < 1
    made = Adapter.load(tmp_path / "o")
    assert made.metadata["base_fingerprint"].keys() == {"layers.0.up.weight"}


def test_options_that_do_not_go_together(shira, saved, tmp_path):
    to = ["--to", "peft", "--output", tmp_path / "o"]
    refused(shira("convert", saved, *to, "--density", "0.1"), "is no LoRA")
    refused(shira("convert", saved, *to, "--scale", "2"), "are for --format patch")
    refused(shira("convert", tmp_path / "no", *to), "no such file or folder")


def test_needs_the_core_alone(saved, base, tmp_path):
    """Unless a config tells of a model of transformers, which then knows its names."""
    (base / "config.json").write_text("{}")
    code = (
        "import sys\n"
        "from shira.cli import main\n"
        f"try: main(['merge', {str(saved)!r}, '--base', {str(base)!r}, '--output', "
        f"{str(tmp_path / 'o')!r}])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('MODULES', *sys.modules)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    loaded = {name.partition(".")[0] for name in out.partition("MODULES")[2].split()}
    assert not {"peft", "transformers", "accelerate", "huggingface_hub"} & loaded


def test_many_weights_are_summed_up(shira, tmp_path):
    tensors = {f"{i}.weight": torch.randn(4, 4) for i in range(40)}
    save_file(tensors, tmp_path / "base.safetensors")
    delta = SparseDelta(Support((4, 4), torch.tensor([1])), torch.ones(1))
    Adapter(dict.fromkeys(tensors, delta)).save(tmp_path / "adapter", format="peft")
    arguments = ["--base", tmp_path / "base.safetensors", "--output", tmp_path / "o.safetensors"]
    answer = shira("merge", tmp_path / "adapter", *arguments)
    assert "... and 16 more (--json lists all)" in answer.out
