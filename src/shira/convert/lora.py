# SPDX-License-Identifier: Apache-2.0
"""A LoRA, from a PEFT folder or as factors, made into an adapter of its largest entries.

A LoRA adds ``scaling * B A`` (arXiv 2106.09685) to a weight, ``A`` of shape ``(r, in)`` and ``B``
of shape ``(out, r)``. The product is made by blocks of its rows and never whole: each block is
searched for entries among the k largest so far, and the values of those that remain are computed
once more. The energy of the whole, ``|B A|^2``, is the trace of ``(A A^T)(B^T B)``, two r x r
matrices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import fingerprint_fields
from shira.checkpoints.entries import Progress
from shira.checkpoints.models import PIECE, Model, Source, names_in, source_of
from shira.convert.lora_file import Factors, oriented, read_lora
from shira.delta import SparseDelta
from shira.errors import AdapterError, MaskError
from shira.masks.budget import Budget
from shira.support import Support

BLOCK = 2**21
"""Entries of the product that are made at once: 8 MiB of float32."""

_PAIRS = 2**16  # entries whose r products are summed at once
_UNFOLDED = 2**14  # entries of an update for each value of A and B, at most, without the base


@dataclass(frozen=True)
class KeptUpdate:
    """The part of one weight's update that was kept.

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
    weights: tuple[KeptUpdate, ...]

    @property
    def energy_share(self) -> float:
        """Share of the squared update that the adapter holds, from 0 to 1."""
        whole = math.fsum(kept.energy for kept in self.weights)
        return math.fsum(kept.energy_kept for kept in self.weights) / whole if whole else 1.0

    def as_json(self) -> dict[str, Any]:
        """Return everything but the adapter's values as JSON can hold it."""
        return {
            "nnz": self.adapter.nnz,
            "density": self.adapter.density,
            "energy_share": self.energy_share,
            "whole_tensors": list(self.adapter.tensors),
            "weights": [asdict(kept) for kept in self.weights],
        }


def from_lora(
    lora: str | os.PathLike[str] | Iterable[Factors],
    *,
    base: Model | None = None,
    density: float | None = None,
    r: int | None = None,
    everywhere: bool = False,
    progress: Progress | None = None,
) -> FromLora:
    """Make an adapter of the largest entries of a LoRA's update.

    Modules that were trained whole beside it (``modules_to_save``) become its whole tensors.

    Without a budget it has as many entries in each weight as the LoRA has parameters.

    Args:
        lora: A folder in PEFT's format, or `Factors`.
        base: The base model, where it is at hand: shapes are checked, weights that are stored
            transposed are recognized, and the adapter gets the base's fingerprint. Needed for a
            Conv1D whose config does not tell ``fan_in_fan_out``.
        density: Keep at most this share of each weight's entries.
        r: Keep at most ``r * (m + n)`` entries of an m x n weight.
        everywhere: Spend the sum of these budgets on the largest entries of all weights.
        progress: Told the entries done and those there are in all.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        FileFormatError: If a file is damaged, or no LoRA.
        AdapterError: If the LoRA is a variant or a convolution's, two are of one weight, a value
            is not finite, a copy of an adapted embedding is in the file that is not known to be
            the base's, or, without a base, a weight is larger than the LoRA makes likely.
        WrongBaseError: If the base lacks a weight, or has it in another shape.
        ConfigError: If the budget is not possible.

    Example:
        >>> from shira.convert import Factors, from_lora
        >>> found = from_lora([Factors("w", torch.ones(1, 4), torch.eye(4, 1))], density=0.25)
        >>> found.adapter["w"].support.indices.tolist(), found.energy_share
        ([0, 1, 2, 3], 1.0)
    """
    budget = Budget(density, r, everywhere)
    if isinstance(lora, (str, os.PathLike)):
        folder = os.fspath(lora)
        factors, config, whole = read_lora(lora)
    else:
        folder, factors, config, whole = None, list(lora), {}, {}
    names = {one.name: one.name for one in factors}
    source = None if base is None else source_of(base, list(names), all_names=True)
    if source is not None:
        names = names_in(source, list(names), "LoRA")
        shapes = {name: source.shapes[theirs] for name, theirs in names.items()}
        factors = oriented(factors, shapes, folder or source.label, turn=folder is not None)
    elif folder is not None:
        _check_sizes(factors, folder)
    if folder is not None:
        _check_copies(names, whole, source, folder)
    whole = {name: tensor for name, tensor in whole.items() if name not in names}
    # what the LoRA is of, not how it was trained
    fields = ("base_model_name_or_path", "revision", "task_type")
    metadata = {name: config[name] for name in fields if config.get(name) is not None}
    deltas, kept = sparsify(factors, budget, progress)
    if source is not None:
        metadata |= fingerprint_fields(
            {name: source.entries(names[name], d.support.indices) for name, d in deltas.items()}
        )
    return FromLora(Adapter(deltas, metadata, whole), kept)


def sparsify(
    factors: Sequence[Factors], budget: Budget, progress: Progress | None
) -> tuple[dict[str, SparseDelta], tuple[KeptUpdate, ...]]:
    """Keep the largest entries of LoRA updates; if the budget is open as many as A and B have."""
    updates = {one.name: one for one in factors}
    if len(updates) < len(factors):
        raise AdapterError("two LoRAs of one weight; fuse them first")
    shapes = {name: one.shape for name, one in updates.items()}
    total, done, now = sum(map(math.prod, shapes.values())), 0, ""

    def scores(one: Factors) -> Iterator[Tensor]:
        nonlocal done, now
        now = one.name
        for block in update_blocks(one):
            done += block.numel()
            if progress is not None:
                progress(done, total)
            yield block.abs_().reshape(-1)

    as_lora = {n: min(math.prod(f.shape), f.rank * sum(f.shape)) for n, f in updates.items()}
    magnitudes = {name: scores(one) for name, one in updates.items()}
    try:
        chosen = budget.largest(magnitudes, shapes, as_lora)
    except MaskError as error:
        raise AdapterError(f"{now!r}: {error}") from error
    deltas, kept = {}, []
    for name, one in updates.items():
        flat, values = chosen[name], values_at(one, chosen[name])
        if not bool(values.isfinite().all()):
            raise AdapterError(f"{name!r}: its update holds values that are not finite")
        flat, values = flat[values != 0], values[values != 0]
        if values.numel():
            deltas[name] = SparseDelta(Support._trusted(one.shape, flat), values)
        part = float(values.double().square().sum())
        energy = max(energy_of(one), part)  # rounding may put a whole below its part
        kept.append(KeptUpdate(name, one.shape, one.rank, values.numel(), energy, part))
    return deltas, tuple(kept)


def update_blocks(one: Factors) -> Iterator[Tensor]:
    """Make the update of a weight as it is stored, in rows of at most `BLOCK` entries, or one."""
    left, right = one.sides()
    rows = max(1, BLOCK // max(1, right.shape[1]))
    for some in torch.split(left, rows):
        yield (some @ right).mul_(one.scaling)


def values_at(one: Factors, flat: Tensor) -> Tensor:
    """Return ``(k,)`` entries of the update at flat indices, each a sum of r products."""
    left, right = one.sides()
    columns, width = right.t().contiguous(), one.shape[1]
    pieces = torch.split(flat.long(), _PAIRS)
    sums = [(left[at // width] * columns[at % width]).sum(1) for at in pieces]
    return torch.cat(sums).mul_(one.scaling)


def energy_of(one: Factors) -> float:
    """Return the sum of squares of the update, from two r x r matrices."""
    left, right = (side.double() for side in one.sides())
    return float(((left.t() @ left) * (right @ right.t())).sum()) * one.scaling**2


def _check_sizes(factors: list[Factors], folder: str) -> None:
    """Refuse weights so large that no base has them: a small file could ask for days of work."""
    for one in factors:
        values, entries = one.a.numel() + one.b.numel(), math.prod(one.shape)
        if entries > _UNFOLDED * values:
            raise AdapterError(
                f"{folder}: {one.name!r}: {values} values stand for a weight of {one.shape}, which "
                f"has {entries} entries, more than {_UNFOLDED} for each. Give the base model, to "
                "show that it has such a weight"
            )


def _check_copies(
    names: Mapping[str, str], whole: Mapping[str, Tensor], source: Source | None, folder: str
) -> None:
    """Refuse copies of weights that the LoRA changes, if they are not known to be the base's."""
    for name, theirs in names.items():
        if name in whole and (source is None or not _is(whole[name], source, theirs)):
            raise AdapterError(
                f"{folder}: it holds a copy of {name!r}, which the LoRA changes, and "
                f"{'no base is given to compare it with' if source is None else 'the base another'}"
                "; save the LoRA of this base again, with save_embedding_layers=False"
            )


def _is(copy: Tensor, source: Source, name: str) -> bool:
    """Return whether a copy is the base's tensor, rounded to the narrower dtype of the two."""
    pairs = zip(torch.split(copy.reshape(-1), PIECE), source.blocks(name), strict=False)
    return tuple(copy.shape) == source.shapes[name] and all(
        torch.equal(part.to(block.dtype), block) or torch.equal(part, block.to(part.dtype))
        for part, block in pairs
    )
