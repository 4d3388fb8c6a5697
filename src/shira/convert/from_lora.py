# SPDX-License-Identifier: Apache-2.0
"""A LoRA, from a PEFT folder or as factors, made into an adapter of its largest entries."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import fingerprint_fields
from shira.checkpoints.naming import match_names
from shira.checkpoints.sources import Model, Source, source_of
from shira.convert.budgets import budget_or_none
from shira.convert.lora import Factors, FromLora, Progress, sparsify
from shira.convert.lora_file import oriented, read_lora
from shira.errors import AdapterError, WrongBaseError, did_you_mean

_UNFOLDED = 2**14  # entries of an update for each value of A and B, at most, without the base


def from_lora(
    lora: str | os.PathLike[str] | Iterable[Factors],
    *,
    base: Model | None = None,
    density: float | None = None,
    r: int | None = None,
    everywhere: bool = False,
    progress: Progress | None = None,
) -> FromLora:
    """The adapter that holds the largest entries of a LoRA's update.

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
    """
    budget = budget_or_none(density, r, everywhere)
    source = None if base is None else source_of(base, shared=True)
    if isinstance(lora, (str, os.PathLike)):
        factors, config, whole = read_lora(lora)
        names = _names(factors, source)
        if source is not None:
            shapes = {name: source.shapes[theirs] for name, theirs in names.items()}
            factors = oriented(factors, shapes, os.fspath(lora))
        else:
            _check_sizes(factors, os.fspath(lora))
        _check_copies(factors, names, whole, source, os.fspath(lora))
        whole = {name: tensor for name, tensor in whole.items() if name not in names}
        metadata = _metadata(config)
    else:
        factors, whole, metadata = list(lora), {}, {}
        names = _names(factors, source)
        _check_shapes(factors, names, source)
    deltas, kept = sparsify(factors, budget, progress)
    if source is not None:
        metadata |= fingerprint_fields(
            {name: source.entries(names[name], d.support.indices) for name, d in deltas.items()}
        )
    return FromLora(Adapter(deltas, metadata, whole), kept)


def _check_sizes(factors: list[Factors], folder: str) -> None:
    """Refuse weights so large that no base has them: a small file could ask for days of work."""
    for one in factors:
        held, entries = one.a.numel() + one.b.numel(), math.prod(one.shape)
        if entries > _UNFOLDED * held:
            raise AdapterError(
                f"{folder}: {one.name!r}: {held} values stand for a weight of {one.shape}, which "
                f"has {entries} entries, more than {_UNFOLDED} for each. Give the base model, to "
                "show that it has such a weight"
            )


def _names(factors: list[Factors], source: Source | None) -> dict[str, str]:
    """What the base calls each weight."""
    wanted = [one.name for one in factors]
    if source is None or not wanted:
        return {name: name for name in wanted}
    prefix = match_names(wanted, source.shapes)
    if prefix is None:
        odd = next((name for name in wanted if name not in source.shapes), wanted[0])
        raise WrongBaseError(
            f"{source.label}: there is no {odd!r}, which the LoRA changes; is this its base?"
            f"{did_you_mean(odd, source.shapes)}"
        )
    return {name: prefix.apply(name) or name for name in wanted}


def _check_copies(
    factors: list[Factors],
    names: dict[str, str],
    whole: dict[str, Tensor],
    source: Source | None,
    folder: str,
) -> None:
    """Refuse copies of weights that the LoRA changes, if they are not known to be the base's."""
    for one in factors:
        copy = whole.get(one.name)
        if copy is not None and (source is None or not _is(copy, source, names[one.name])):
            raise AdapterError(
                f"{folder}: it holds a copy of {one.name!r}, which the LoRA changes, and "
                f"{'no base is given to compare it with' if source is None else 'the base another'}"
                "; save the LoRA of this base again, with save_embedding_layers=False"
            )


def _is(copy: Tensor, source: Source, name: str) -> bool:
    """Return whether a copy is the base's tensor, rounded to the narrower dtype of the two."""
    if tuple(copy.shape) != source.shapes[name]:
        return False
    flat, at = copy.reshape(-1), 0
    for block in source.blocks(name):
        part = flat[at : at + block.numel()]
        at += block.numel()
        if not (
            torch.equal(part.to(block.dtype), block) or torch.equal(part, block.to(part.dtype))
        ):
            return False
    return True


def _check_shapes(factors: list[Factors], names: dict[str, str], source: Source | None) -> None:
    if source is None:
        return
    for one in factors:
        if source.shapes[names[one.name]] != one.shape:
            raise WrongBaseError(
                f"{source.label}: {names[one.name]!r} has shape "
                f"{source.shapes[names[one.name]]}, but the LoRA is of one of {one.shape}"
            )


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What an adapter inherits from the config of a LoRA: what it is of, not how it was trained."""
    fields = ("base_model_name_or_path", "revision", "task_type")
    return {name: config[name] for name in fields if config.get(name) is not None}
