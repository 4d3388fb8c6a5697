# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to make chains of, and what they hold, byte for byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from shira.store.header import width_of

DTYPES = ["F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8", "F4"]


def write(path: Path, shards: dict[str, dict[str, tuple[str, list[int], bytes]]], **others) -> Path:
    """A checkpoint's folder, of tensors ``{file: {name: (dtype, shape, bytes)}}``."""
    path.mkdir(parents=True)
    for name, tensors in shards.items():
        (path / name).write_bytes(file_of(tensors))
    if len(shards) > 1:
        placed = {key: name for name, tensors in shards.items() for key in tensors}
        others |= {"model.safetensors.index.json": json.dumps({"weight_map": placed})}
    for name, text in others.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def file_of(
    tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict | None = None
) -> bytes:
    header, at = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values())


def contents(path: Path) -> dict[str, bytes]:
    """All files of a folder by name, or those of a file."""
    if path.is_file():
        return {"": path.read_bytes()}
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def random_tensor(rng: np.random.Generator, dtype: str, shape: list[int]):
    """A tensor of any bits."""
    bits = math.prod(shape) * (4 if dtype == "F4" else 8 * width_of(dtype))
    return dtype, shape, rng.integers(0, 256, bits // 8, np.uint8).tobytes()


def changed(rng: np.random.Generator, tensor, share: float):
    """The tensor with a share of its entries other bits."""
    dtype, shape, raw = tensor
    numbers = np.frombuffer(bytearray(raw), f"<u{width_of(dtype)}")
    where = rng.random(numbers.size) < share
    numbers[where] ^= rng.integers(1, 256, int(where.sum())).astype(numbers.dtype)
    return dtype, shape, numbers.tobytes()


def bfloat16(values: torch.Tensor):
    raw = values.bfloat16().reshape(-1).view(torch.uint8).numpy().tobytes()
    return "BF16", list(values.shape), raw


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a small model."""
    torch.manual_seed(seed)
    names = {"embed.weight": (64, 16), **{f"layers.{i}.weight": (32, 48) for i in range(3)}}
    return {name: torch.randn(shape) * 0.02 for name, shape in names.items()}


def chain_of(folder: Path, count: int) -> list[Path]:
    """Checkpoints ``0`` to ``count``, each a small step further, with a config that counts them."""
    weights, paths = model(), []
    for number in range(count + 1):
        shards = {"model.safetensors": {k: bfloat16(w) for k, w in weights.items()}}
        config = json.dumps({"step": number // 3})
        others = {"config.json": config, "tokenizer.json": "[]"}
        paths.append(write(folder / str(number), shards, **others))
        weights = {key: w + 1e-4 * torch.randn_like(w) for key, w in weights.items()}
    return paths
