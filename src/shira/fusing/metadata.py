# SPDX-License-Identifier: Apache-2.0
"""What is still true of an adapter that was made from others, and how it was made.

A fact is carried over only where it holds for the result: the base model and the task if all agree,
the mask if the positions are still those, a weight's fingerprint if its positions are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shira._version import __version__
from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD
from shira.delta import SparseDelta

FUSED = "fused"
"""The field that tells how an adapter was made; also the ``mask_type`` of one without a mask."""

MASK_FIELDS = (
    "mask_type",
    "random_seed",
    "mask_slot",
    "mask_options",
    "r",
    "density",
    "rank_pattern",
)
MODULES_FIELD = "modules_to_save"
TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def derived_metadata(
    sources: Sequence[Adapter],
    deltas: Mapping[str, SparseDelta],
    tensors: Mapping[str, Tensor],
    made: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metadata of an adapter that was made of others.

    Args:
        sources: At least one.
        deltas: Of the result.
        tensors: Of the result, those that are whole.
        made: How; goes under `FUSED`.
    """
    result = _agreed(sources)
    if any(set(source) != set(deltas) for source in sources):
        for field in TARGET_FIELDS:
            result.pop(field, None)
    if any(source.tensors.keys() != tensors.keys() for source in sources):
        result.pop(MODULES_FIELD, None)
    if not all(_same_positions(source, deltas) for source in sources):
        for field in MASK_FIELDS:
            result.pop(field, None)
        result["mask_type"] = FUSED
    result |= _fingerprints(sources, deltas)
    if made is not None:
        result[FUSED] = dict(made)
    return result


def record(
    method: str,
    sources: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """How an adapter was fused, in what JSON can hold.

    Of a source that was fused itself only its method is named, so that the record of a long chain
    stays short.
    """
    return {
        "method": method,
        **options,
        "from": [
            {
                "name": name,
                "weight": weight,
                "nnz": source.nnz,
                **{
                    field: source.metadata[field]
                    for field in ("mask_type", "random_seed", "mask_slot")
                    if source.metadata.get(field) is not None
                },
                **_method_of(source),
            }
            for source, name, weight in zip(sources, names, weights, strict=True)
        ],
        "shira": __version__,
    }


def _method_of(source: Adapter) -> dict[str, Any]:
    made = source.metadata.get(FUSED)
    return {"method": made["method"]} if isinstance(made, Mapping) and "method" in made else {}


def _agreed(sources: Sequence[Adapter]) -> dict[str, Any]:
    first, *others = (source.metadata for source in sources)
    return {
        field: value
        for field, value in first.items()
        if field not in (FUSED, FINGERPRINT_FIELD, ROUNDED_FIELD)
        and all(field in other and other[field] == value for other in others)
    }


def _same_positions(source: Adapter, deltas: Mapping[str, SparseDelta]) -> bool:
    """Whether each delta that both have stands where the source's does."""
    return all(
        name not in source or _same_support(source[name], delta) for name, delta in deltas.items()
    ) and any(name in source for name in deltas)


def _fingerprints(sources: Sequence[Adapter], deltas: Mapping[str, SparseDelta]) -> dict[str, Any]:
    """Those that are of the result's own positions."""
    kept: dict[str, Any] = {}
    for name, delta in deltas.items():
        for source in sources:
            if name not in (source.metadata.get(FINGERPRINT_FIELD) or {}):
                continue
            if name in source and _same_support(source[name], delta):
                for field in (FINGERPRINT_FIELD, ROUNDED_FIELD):
                    known = source.metadata.get(field) or {}
                    if name in known:
                        kept.setdefault(field, {})[name] = known[name]
                break
    return kept


def _same_support(a: SparseDelta, b: SparseDelta) -> bool:
    return a.support is b.support or a.support == b.support
