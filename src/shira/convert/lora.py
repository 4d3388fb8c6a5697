# SPDX-License-Identifier: Apache-2.0
"""From LoRA to the k largest entries of its update.

A LoRA adds ``scaling * B A`` (arXiv 2106.09685) to a weight, ``A`` of shape ``(r, in)`` and ``B``
of shape ``(out, r)``. The product is made by blocks of its rows and never whole: each block is
searched for entries among the k largest so far, and the values of those that remain are computed
once more. The energy of the whole, ``|B A|^2``, is the trace of ``(A A^T)(B^T B)``, two r x r
matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import accumulation_dtype
from shira.convert.budgets import Budget
from shira.delta import SparseDelta
from shira.errors import AdapterError, MaskError
from shira.masks.topk import top_k
from shira.support import Support

BLOCK = 2**21
"""Entries of the product that are made at once: 8 MiB of float32."""

_PAIRS = 2**16  # entries whose r products are summed at once

Progress = Callable[[int, int], None]
"""Told the entries that are done and those there are in all."""


@dataclass(frozen=True)
class Factors:
    """The LoRA of one weight.

    Attributes:
        name: The base model's own name of the weight.
        a: ``(r, in)``.
        b: ``(out, r)``.
        scaling: Factor on the product: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        transposed: Whether the weight is stored as ``[in, out]`` (Conv1D, embeddings), not as
            ``[out, in]``.
    """

    name: str
    a: Tensor
    b: Tensor
    scaling: float = 1.0
    transposed: bool = False

    def __post_init__(self) -> None:
        shapes = f"A {tuple(self.a.shape)} and B {tuple(self.b.shape)}"
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise AdapterError(f"{self.name!r}: {shapes} are not (r, in) and (out, r)")
        if not (self.a.is_floating_point() and self.b.is_floating_point()):
            raise AdapterError(f"{self.name!r}: {self.a.dtype} and {self.b.dtype} are not floats")
        if not abs(self.scaling) <= torch.finfo(torch.float32).max:
            raise AdapterError(f"{self.name!r}: a scaling of {self.scaling:.3g} is beyond float32")

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as it is stored."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)

    def sides(self) -> tuple[Tensor, Tensor]:
        """``(rows, r)`` and ``(r, cols)``, whose product times ``scaling`` is the update as stored.

        In the dtype in which it is made: float32, or float64 if A or B is.
        """
        wide = accumulation_dtype(self.a.dtype, self.b.dtype)
        a, b = self.a.detach().cpu().to(wide), self.b.detach().cpu().to(wide)
        return (a.t(), b.t()) if self.transposed else (b, a)


@dataclass(frozen=True)
class Kept:
    """What was kept of one weight's update.

    Attributes:
        name: The parameter.
        shape: Its shape.
        rank: Of its LoRA.
        kept: Entries kept.
        energy: Sum of squares of the update.
        energy_kept: That of the entries kept.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    kept: int
    energy: float
    energy_kept: float


@dataclass(frozen=True)
class FromLora:
    """An adapter and how much of the LoRA it holds.

    Attributes:
        adapter: The adapter.
        weights: Weight by weight.
    """

    adapter: Adapter
    weights: tuple[Kept, ...]

    @property
    def energy_share(self) -> float:
        """Share of the squared update that the adapter holds, from 0 to 1."""
        whole = math.fsum(kept.energy for kept in self.weights)
        return math.fsum(kept.energy_kept for kept in self.weights) / whole if whole else 1.0

    def as_json(self) -> dict[str, Any]:
        """Everything but the adapter's values, in what JSON can hold."""
        return {
            "nnz": self.adapter.nnz,
            "density": self.adapter.density,
            "energy_share": self.energy_share,
            "whole_tensors": list(self.adapter.tensors),
            "weights": [asdict(kept) for kept in self.weights],
        }


def sparsify(
    factors: Iterable[Factors], budget: Budget | None = None, progress: Progress | None = None
) -> tuple[dict[str, SparseDelta], tuple[Kept, ...]]:
    """The largest entries of LoRA updates.

    Args:
        factors: One for each weight.
        budget: How many entries; without one as many as A and B have.
        progress: Told the entries done and those there are in all.

    Returns:
        Deltas by parameter name, float32 (float64 for float64 factors), without those that are
        zero; and what was kept of each weight.

    Raises:
        AdapterError: If two are of one weight, or a value is not finite.
    """
    updates = list(factors)
    if len({one.name for one in updates}) < len(updates):
        raise AdapterError("two LoRAs of one weight; fuse them first")
    report = _Progress(sum(math.prod(one.shape) for one in updates), progress)
    if budget is not None and budget.everywhere:
        chosen = _largest_of_all(updates, budget, report)
    else:
        chosen = [_largest(one, budget, report) for one in updates]
    deltas, kept = {}, []
    for one, flat in zip(updates, chosen, strict=True):
        values = values_at(one, flat)
        if not bool(values.isfinite().all()):
            raise AdapterError(f"{one.name!r}: its update holds values that are not finite")
        flat, values = flat[values != 0], values[values != 0]
        if values.numel():
            deltas[one.name] = SparseDelta(Support._trusted(one.shape, flat), values)
        held = float(values.double().square().sum())
        energy = max(energy_of(one), held)  # rounding may put a whole below its part
        kept.append(Kept(one.name, one.shape, one.rank, values.numel(), energy, held))
    return deltas, tuple(kept)


def update_blocks(one: Factors) -> Iterator[Tensor]:
    """The update of a weight as it is stored, in blocks of whole rows of at most `BLOCK` entries.

    (A single row if that is longer.)
    """
    left, right = one.sides()
    rows = max(1, BLOCK // max(1, right.shape[1]))
    for low in range(0, len(left), rows):
        yield (left[low : low + rows] @ right).mul_(one.scaling)


def values_at(one: Factors, flat: Tensor) -> Tensor:
    """``(k,)`` entries of the update at flat indices, each a sum of r products."""
    left, right = one.sides()
    columns = right.t().contiguous()
    found = torch.empty(flat.numel(), dtype=left.dtype)
    for low in range(0, flat.numel(), _PAIRS):
        piece = flat[low : low + _PAIRS].long()
        pairs = left[piece // one.shape[1]] * columns[piece % one.shape[1]]
        found[low : low + _PAIRS] = pairs.sum(1).mul_(one.scaling)
    return found


def energy_of(one: Factors) -> float:
    """Sum of squares of the update, from two r x r matrices."""
    left, right = (side.double() for side in one.sides())
    return float(((left.t() @ left) * (right @ right.t())).sum()) * one.scaling**2


class _Progress:
    def __init__(self, total: int, tell: Progress | None) -> None:
        self.total, self.tell, self.done = total, tell, 0

    def scores(self, one: Factors) -> Iterator[Tensor]:
        """Magnitudes of a weight's update, in flat pieces."""
        for block in update_blocks(one):
            self.done += block.numel()
            if self.tell is not None:
                self.tell(self.done, self.total)
            yield block.abs_().reshape(-1)


def _largest(one: Factors, budget: Budget | None, report: _Progress) -> Tensor:
    numel = math.prod(one.shape)
    k = min(numel, one.rank * sum(one.shape)) if budget is None else budget.entries(one.shape)
    if not k:
        return torch.empty(0, dtype=torch.int64)
    try:
        return top_k(report.scores(one), k)
    except MaskError as error:
        raise AdapterError(f"{one.name!r}: {error}") from error


def _largest_of_all(updates: list[Factors], budget: Budget, report: _Progress) -> list[Tensor]:
    """Flat indices for each weight, of the largest entries of all seen as one long tensor."""
    total = sum(budget.entries(one.shape) for one in updates)
    if not total:
        return [torch.empty(0, dtype=torch.int64) for _ in updates]
    flat = top_k(itertools.chain.from_iterable(report.scores(one) for one in updates), total)
    chosen, start = [], 0
    for one in updates:
        end = start + math.prod(one.shape)
        low, high = torch.searchsorted(flat, torch.tensor([start, end])).tolist()
        chosen.append(flat[low:high] - start)
        start = end
    return chosen
