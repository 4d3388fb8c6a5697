# SPDX-License-Identifier: Apache-2.0
"""Small modules and adapters for them, and what a switched module must hold: the slow reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shira import Adapter, SparseDelta, Support
from shira.base import accumulation_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Weights of several kinds of shapes."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.emb = nn.Embedding(7, 6, dtype=dtype)
        self.block = nn.Sequential(nn.Linear(6, 10, dtype=dtype), nn.ReLU())
        self.conv = nn.Conv2d(2, 3, 2, dtype=dtype)
        for layer in (self.emb, self.block[0], self.conv):
            layer.weight = weight(*layer.weight.shape)
        for layer in (self.block[0], self.conv):
            nn.init.ones_(layer.bias)
        self.vector = weight(9)


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight


NAMES = ("emb.weight", "block.0.weight", "conv.weight", "vector")


def net(dtype: torch.dtype = torch.float32) -> Net:
    return Net(0, dtype)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(p, weights[name]) for name, p in module.named_parameters())


def pointers(module: nn.Module) -> list[int]:
    return [p.data_ptr() for p in module.parameters()]


def random_adapter(
    module: nn.Module,
    seed: int,
    names: tuple[str, ...] = NAMES,
    density: float = 0.4,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Overlaps with others of other seeds in about ``density`` of its entries."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        shape = module.get_parameter(name).shape
        mask = torch.rand(shape, generator=generator) < density
        support = Support.from_mask(mask)
        values = torch.randn(support.nnz, generator=generator).to(dtype)
        deltas[name] = SparseDelta(support, values)
    return Adapter(deltas)


def expected(
    base: Mapping[str, Tensor], adapters: Mapping[str, Adapter], active: Mapping[str, float]
) -> dict[str, Tensor]:
    """What the weights must hold, to the bit, made densely and one entry at a time."""
    result = {name: weight.clone() for name, weight in base.items()}
    for parameter, weight in base.items():
        parts = [
            (adapters[name][parameter], scale)
            for name, scale in sorted(active.items())
            if parameter in adapters[name]
        ]
        if not parts:
            continue
        wide = accumulation_dtype(weight.dtype, *(delta.values.dtype for delta, _ in parts))
        total = torch.zeros(weight.shape, dtype=wide)
        touched = torch.zeros(weight.shape, dtype=torch.bool)
        for delta, scale in parts:
            for index, value in zip(delta.support.indices.tolist(), delta.values, strict=True):
                total.view(-1)[index] += value.to(wide) * scale
                touched.view(-1)[index] = True
        merged = (weight.to(wide) + total).to(weight.dtype)
        result[parameter] = torch.where(touched, merged, weight)
    return result
