# SPDX-License-Identifier: Apache-2.0
"""Modules and adapters to switch: made up from shapes, or after adapters on disk.

Weights hold random bits of a small pool: switching does not look at values, and filling a billion
of them with fresh ones would take longer than the measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError
from shira.masks import random_support
from shira.support import matrix_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shape_of(text: str) -> tuple[int, int]:
    """``"4096x11008"`` as a shape.

    Raises:
        ConfigError: If it is no two positive numbers.
    """
    rows, _, cols = text.lower().partition("x")
    known = rows.isdecimal() and cols.isdecimal() and len(text) < 20  # within 64 bits
    if not (known and int(rows) and int(cols)):
        raise ConfigError(f"a shape is written ROWSxCOLUMNS, as 4096x11008, not {text!r}")
    return int(rows), int(cols)


def module_of(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> nn.Module:
    """A module whose parameters have these names and shapes; it computes nothing."""
    random = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    pool = (0.02 * random).to(dtype)  # as large as weights of language models are
    root = nn.Module()
    for name, shape in shapes.items():
        owner, *rest = root, *name.split(".")
        for part in rest[:-1]:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        weight = torch.empty(tuple(shape), dtype=dtype)
        flat = weight.view(-1)
        for start in range(0, flat.numel(), pool.numel()):
            piece = flat[start : start + pool.numel()]
            piece.copy_(pool[: piece.numel()])
        owner.register_parameter(rest[-1], nn.Parameter(weight, requires_grad=False))
    return root


def random_adapter(shapes: Mapping[str, Sequence[int]], r: int, seed: int) -> Adapter:
    """``r (m + n)`` random entries of each weight, as many as LoRA of rank r has parameters."""
    deltas = {}
    for name, shape in shapes.items():
        k = min(r * sum(matrix_shape(shape)), torch.Size(shape).numel())
        support = random_support(tuple(shape), k, seed=seed, name=name)
        generator = torch.Generator().manual_seed(seed)
        deltas[name] = SparseDelta(support, torch.randn(k, generator=generator) * 0.02)
    return Adapter(deltas)


def shapes_in(adapters: Iterable[Adapter]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that adapters are for.

    Raises:
        AdapterError: If two of them take a weight for one of another shape, or one has whole
            tensors, which are no k entries.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapters:
        adapter.require_sparse("switch-bench")
        for name, delta in adapter.items():
            if shapes.setdefault(name, delta.support.shape) != delta.support.shape:
                raise AdapterError(
                    f"the adapters are for different bases: {name!r} has shape {shapes[name]} in "
                    f"one and {delta.support.shape} in another"
                )
    return shapes


def touched_lines(weight: Tensor, *offsets: Tensor) -> Tensor:
    """int32: which 64-byte lines of a weight's memory hold one of these entries."""
    per_line = 64 // weight.element_size()
    lines: Tensor = torch.cat([at.long() for at in offsets]) // per_line
    unique: Tensor = torch.unique_consecutive(lines.sort().values)
    return unique.to(torch.int32)
