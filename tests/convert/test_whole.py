# SPDX-License-Identifier: Apache-2.0
"""Whole tensors of an adapter: merged into a checkpoint and taken out, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter
from shira.convert import merge, to_patches, unmerge
from shira.errors import AdapterError, MergeError, WrongBaseError
from tests.adapters import delta

BASE = {
    "model.up.weight": torch.arange(24.0).view(4, 6),
    "model.norm.count": torch.tensor(3),
    "model.norm.mask": torch.tensor([1, 0], dtype=torch.uint8),
    "head.weight": torch.arange(6.0).view(2, 3),
    "head.bias": torch.zeros(2).bfloat16(),
}
HEAD = torch.tensor([[0.0, 1.0, -2.5], [9.0, 0.1, 5.0]], dtype=torch.float64)
WHOLE = {
    "head.weight": HEAD,
    "head.bias": torch.tensor([0.1, -0.0]),
    "model.norm.count": torch.tensor(8),
    "model.norm.mask": torch.tensor([0, 0], dtype=torch.uint8),
}


def adapter(**whole) -> Adapter:
    return Adapter({"model.up.weight": delta((4, 6), {3: 2.0})}, None, whole or WHOLE)


@pytest.fixture
def base(tmp_path):
    """Two shards and an index."""
    folder = tmp_path / "base"
    folder.mkdir()
    shards = {
        "a.safetensors": {name: t for name, t in BASE.items() if name.startswith("model.")},
        "b.safetensors": {name: t for name, t in BASE.items() if name.startswith("head.")},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    placed = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def read(folder):
    return {**load_file(folder / "a.safetensors"), **load_file(folder / "b.safetensors")}


def test_merged_and_undone(base, tmp_path):
    told = merge(adapter(), base, tmp_path / "merged", undo=tmp_path / "undo")
    found = read(tmp_path / "merged")
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in BASE.items()}
    for name, tensor in WHOLE.items():
        assert torch.equal(found[name], tensor.to(BASE[name].dtype))
    assert float(found["model.up.weight"][0, 3]) == 5.0
    assert told.nnz == 1
    assert {one.name: one.changed for one in told.whole} == {
        "head.weight": 3,
        "head.bias": 2,  # 0.0 and -0.0 are other bits
        "model.norm.count": 1,
        "model.norm.mask": 1,
    }
    assert [one["dtype"] for one in told.as_json()["whole_tensors"]].count("float32") == 1
    unmerge(tmp_path / "merged", tmp_path / "undo", tmp_path / "again")
    for name in ("a.safetensors", "b.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()
    torch.save(found, tmp_path / "kept")
    with pytest.raises(WrongBaseError, match="does not hold what the merge"):
        unmerge(base, tmp_path / "undo", tmp_path / "no")


def test_the_default_device_does_not_matter(base, tmp_path):
    whole = adapter()
    with torch.device("meta"):
        merge(whole, base, tmp_path / "merged")
    assert torch.equal(read(tmp_path / "merged")["head.weight"], HEAD.float())


def test_files_of_either_format_merge_alike(base, tmp_path):
    adapter().save(tmp_path / "compact.safetensors")
    adapter().save(tmp_path / "peft", "peft")
    for name in ("compact.safetensors", "peft"):
        merge(tmp_path / name, base, tmp_path / f"merged-{name}")
        found = read(tmp_path / f"merged-{name}")
        assert torch.equal(found["head.weight"], HEAD.float())


@pytest.mark.parametrize(
    ("whole", "error", "match"),
    [
        (
            {"haed.weight": HEAD},
            WrongBaseError,
            r"no 'haed.weight'.*as a whole.*save the base with",
        ),
        (
            {"head.weight": HEAD[:1]},
            WrongBaseError,
            r"has shape \(2, 3\), but the adapter was made",
        ),
        ({"model.norm.count": torch.tensor(1.0)}, MergeError, "dtype I64: it is quantized or no"),
        ({"head.weight": HEAD.long()}, MergeError, r"dtype F32, and .* tensor torch.int64"),
        ({"head.bias": torch.tensor([3.4e38, 1.0])}, MergeError, "head.bias"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(base, tmp_path, whole, error, match):
    with pytest.raises(error, match=match):
        merge(adapter(**whole), base, tmp_path / "merged", undo=tmp_path / "undo")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_whole_tensor_has_no_scale(base, tmp_path):
    with pytest.raises(AdapterError, match=r"whole tensors \('head.weight', .*not at 0.5"):
        merge(adapter(), base, tmp_path / "merged", scale=0.5)


def test_the_head_of_a_tied_model_is_refused(tmp_path):
    save_file({"model.embed_tokens.weight": torch.ones(5, 4)}, tmp_path / "base.safetensors")
    for name, match in (
        ("lm_head.weight", "is not in the checkpoint: it is tied to 'model.embed_tokens.weight'"),
        ("model.embed_tokens.weight", "is tied: the checkpoint has no output head"),
    ):
        config = {"architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(MergeError, match=match):
            merge(
                Adapter({}, None, {name: torch.zeros(5, 4)}),
                tmp_path / "base.safetensors",
                tmp_path / "merged.safetensors",
            )


def test_patches_hold_none(base):
    with pytest.raises(AdapterError, match=r"patches cannot hold whole tensors.*'head.weight'"):
        to_patches(adapter(), base)
    assert len(to_patches(adapter().restrict(["model.up.weight"]), base)) == 1
