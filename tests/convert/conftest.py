# SPDX-License-Identifier: Apache-2.0
"""A small sharded checkpoint, and adapters for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter, SparseDelta, Support
from shira.base import fingerprint

SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    "model.layers.0.q.weight": (8, 8),
    "model.layers.0.up.weight": (12, 8),
    "model.layers.1.q.weight": (8, 8),
    "model.layers.1.up.weight": (12, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
SHARDS = {  # the last holds no target
    "model-00001-of-00003.safetensors": [*SHAPES][:3],
    "model-00002-of-00003.safetensors": [*SHAPES][3:5],
    "model-00003-of-00003.safetensors": [*SHAPES][5:],
}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], shards=SHARDS) -> Path:
    """A sharded checkpoint as transformers writes it, with the files that stand beside it."""
    folder.mkdir(parents=True)
    for shard, names in shards.items():
        save_file({n: tensors[n] for n in names}, folder / shard, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    placed = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def tensors(request) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(request.param) for name, shape in SHAPES.items()}


@pytest.fixture
def checkpoint(tensors, tmp_path) -> Path:
    return write_checkpoint(tmp_path / "base", tensors)


def make_adapter(tensors, names=None, k=10, seed=1, **metadata) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    deltas, prints = {}, {}
    for name in names or [n for n in tensors if ".layers." in n]:
        shape = tensors[name].shape
        flat = torch.randperm(tensors[name].numel(), generator=generator)[:k].sort().values
        values = torch.randn(k, generator=generator) * 0.1
        deltas[name] = SparseDelta(Support(shape, flat), values)
        prints[name] = fingerprint(tensors[name].reshape(-1)[flat])
    return Adapter(deltas, {"base_fingerprint": prints, **metadata})


@pytest.fixture
def adapter(tensors) -> Adapter:
    return make_adapter(tensors)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def digests(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def applied(tensors, adapter, scale=1.0) -> dict[str, torch.Tensor]:
    """What merging in memory gives."""
    merged = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, delta in adapter.items():
        flat, where = merged[name].view(-1), delta.support.indices.long()
        flat[where] = delta.replacement(flat[where], scale)
    return merged
