# SPDX-License-Identifier: Apache-2.0
"""Masks: the entries of a weight that an adapter trains, chosen by one pure function a mask.

Each returns a `shira.Support` of exactly k entries. A new mask is one file with its function, and
one row of `MASKS`: `shira.ShiraConfig`, the command line and the documentation's tests go by the
table. The tuner calls `choose`, once for each target weight.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shira.errors import ConfigError, MaskError, did_you_mean
from shira.masks.block import block_diagonal_support, block_support, check_options
from shira.masks.budget import budget, budget_from_density
from shira.masks.custom import custom_support
from shira.masks.random import random_support
from shira.masks.scored import grad_support, magnitude_support, snip_support
from shira.masks.struct import struct_support
from shira.masks.topk import check_scored
from shira.support import Support

MASK_FIELDS = ("mask_type", "random_seed", "mask_slot", "mask_options", "r", "density")
"""The fields of an adapter's metadata, and of the tuner's configuration, that say its mask."""


@dataclass(frozen=True)
class MaskSpec:
    """One kind of mask.

    Attributes:
        name: The ``mask_type`` that selects it.
        source: Where it is described: section or equation of the SHiRA paper (arXiv 2406.13175).
        needs: What it looks at beyond the weight's shape, with default options: ``"weight"``,
            ``"gradient"``. See `needs_with`.
        select: The function. Its parameters are among ``shape``, ``k``, ``weight``, ``gradient``,
            ``seed`` and ``name``; those beyond are options of its own.
        check_values: Raises `MaskError` for values of its options that are not possible.
    """

    name: str
    source: str
    needs: frozenset[str]
    select: Callable[..., Support]
    check_values: Callable[..., None] | None = None

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters of `select`."""
        return tuple(inspect.signature(self.select).parameters)

    @cached_property
    def options(self) -> tuple[str, ...]:
        """The keyword options that it takes."""
        return tuple(name for name in self.parameters if name not in _GIVEN)

    def needs_with(self, options: Mapping[str, Any] | None) -> frozenset[str]:
        """Return what it looks at, given its options: a ``score`` needs what that mask does."""
        score = (options or {}).get("score") if "score" in self.options else None
        return MASKS[score].needs if isinstance(score, str) and score in MASKS else self.needs

    def check(self, options: Mapping[str, Any]) -> None:
        """Check options before any weight is looked at.

        Raises:
            ConfigError: If one is unknown, or its value is not possible.
        """
        known = self.options
        for option in options:
            if option not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no options"
                raise ConfigError(
                    f"mask_type {self.name!r} has no option {option!r}; it {takes}."
                    f"{did_you_mean(option, known)}"
                )
        if self.check_values is not None:
            try:
                self.check_values(**options)
            except MaskError as error:
                raise ConfigError(f"mask_type {self.name!r}: {error}") from None


_DIABLO = "(cf. DiaBlo, arXiv 2506.03230)"
_GIVEN = ("shape", "k", "weight", "gradient", "seed", "name")

MASKS: dict[str, MaskSpec] = {
    name: MaskSpec(name, source, frozenset(needs.split()), select, *check)
    for name, source, needs, select, *check in (
        # mask_type   source        needs              function         checks values of options
        ("random", "B.2", "", random_support),
        ("struct", "B.1", "", struct_support),
        ("magnitude", "B.3", "weight", magnitude_support),
        ("grad", "sec. 3.1", "gradient", grad_support),
        ("snip", "eq. 2", "weight gradient", snip_support),
        ("block", "(not in the paper)", "", block_support, check_options),
        ("block_diagonal", _DIABLO, "", block_diagonal_support, check_options),
    )
}


def mask_spec(mask_type: str) -> MaskSpec:
    """Return the row of the table for a ``mask_type``.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return MASKS[mask_type]
    except (KeyError, TypeError):
        raise ConfigError(
            f"unknown mask_type {mask_type!r}; known are {', '.join(map(repr, MASKS))}."
            f"{did_you_mean(str(mask_type), MASKS)}"
        ) from None


def choose(
    mask_type: str,
    shape: Sequence[int],
    k: int,
    *,
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
    seed: int | None = None,
    name: str = "",
    slot: int = 0,
    matrices: int = 1,
    **options: Any,
) -> Support:
    """Choose the mask of one weight, by the name of its kind.

    Args:
        mask_type: A key of `MASKS`.
        shape: Shape of the weight as stored.
        k: The number of entries.
        weight: The weight, for kinds that look at it.
        gradient: Its accumulated gradient, for kinds that look at it.
        seed: For the random kinds.
        name: The parameter's name: part of the key of random kinds, and of every error message.
        slot: For `random`: which of the disjoint masks.
        matrices: The weight is a stack of so many, along its first dimension, as that of a
            mixture's experts. Each gets a mask of its own, of ``k / matrices`` entries, under the
            name ``<name>.<number>``.
        **options: Those of the kind (``MaskSpec.options``).

    Returns:
        A support of exactly k entries.

    Raises:
        ConfigError: If the kind or an option is unknown, the option's value not possible, or a
            random kind has no seed.
        MaskError: If the mask does not fit the weight, or what the kind needs is missing.

    Example:
        >>> shira.masks.choose("struct", (4, 4), 5, axis="column").coordinates()
        tensor([[0, 1, 1, 2, 3],
                [0, 0, 1, 2, 3]], dtype=torch.int32)
    """
    if matrices != 1:
        given: dict[str, Any] = {"weight": weight, "gradient": gradient, "slot": slot}
        given |= {"seed": seed, "name": name}
        return _choose_in_each(mask_type, shape, k, matrices, given, options)
    spec = mask_spec(mask_type)
    if slot:
        options["slot"] = slot
    spec.check(options)
    where = f"{name}: " if name else ""
    scored = {"weight": weight, "gradient": gradient}
    needs = spec.needs_with(options)
    if "seed" in spec.parameters and seed is None and not needs:
        raise ConfigError(f"{where}mask_type {mask_type!r} needs a seed")
    values = {"shape": shape, "k": k, "seed": seed, "name": name, **scored, **options}
    try:
        for need in sorted(needs):
            check_scored(scored[need], need, shape, f"mask_type {mask_type!r}")
        return spec.select(**{key: values[key] for key in spec.parameters if key in values})
    except MaskError as error:
        raise MaskError(f"{where}{error}") from error


def _choose_in_each(
    mask_type: str,
    shape: Sequence[int],
    k: int,
    matrices: int,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Support:
    """Return the masks of a stack of matrices, one after the other."""
    if matrices != shape[0] or k % matrices:
        raise MaskError(
            f"{given['name']}: {k} entries cannot be shared out evenly among the {shape[0]} "
            f"matrices of a weight of shape {tuple(shape)}"
        )
    size, parts = math.prod(shape[1:]), [torch.empty(0, dtype=torch.int64)]
    for at in range(matrices):
        # a tensor for all of them is cut; what is no tensor, or of another shape, is refused below
        own: dict[str, Any] = {
            what: value[at] if isinstance(value, Tensor) and value.shape == tuple(shape) else value
            for what, value in given.items()
        }
        own["name"] = f"{given['name']}.{at}"
        part = choose(mask_type, shape[1:], k // matrices, **own, **options)
        parts.append(part.indices.cpu().long() + at * size)
    return Support._trusted(shape, torch.cat(parts))


__all__ = [
    "MASK_FIELDS",
    "MASKS",
    "MaskSpec",
    "block_diagonal_support",
    "block_support",
    "budget",
    "budget_from_density",
    "choose",
    "custom_support",
    "grad_support",
    "magnitude_support",
    "mask_spec",
    "random_support",
    "snip_support",
    "struct_support",
]
