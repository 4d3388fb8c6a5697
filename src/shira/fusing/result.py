# SPDX-License-Identifier: Apache-2.0
"""Facts about fused adapters: do they go together, and what is true of the result.

Adapters go together if they are of one base model and weights of one shape. A fact is carried over
only where it holds for the result: the base model and the task if all agree, the mask if the
positions are still those, a weight's fingerprint if its positions are. Whole tensors are carried
from one adapter, never summed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shira._version import __version__
from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD, judge_together
from shira.delta import SparseDelta, same_tensor
from shira.errors import AdapterError, ConfigError, WrongBaseError, did_you_mean, listed
from shira.masks import MASK_FIELDS

FUSED = "fused"
"""The field that tells how an adapter was made; also the ``mask_type`` of one without a mask."""

TARGET_FIELDS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "target_parameters",
)


def check_adapters(*adapters: object) -> None:
    """Refuse what is no adapter."""
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise AdapterError(
                f"an adapter is expected, not {type(adapter).__name__}; Adapter.load reads one, "
                "Adapter.from_model takes one out of a model"
            )


def check_together(
    adapters: Sequence[Adapter], names: Sequence[str], *, check_base: bool = True
) -> None:
    """Refuse adapters with a parameter of different shapes or devices, or of different bases.

    A fingerprint is compared where two have the same positions: it says nothing of others.
    """
    for (a, a_name), (b, b_name) in itertools.combinations(zip(adapters, names, strict=True), 2):
        common = [(name, a[name].support, b[name].support) for name in a if name in b]
        for name, of_a, of_b in common:
            if of_a.shape != of_b.shape:
                raise AdapterError(
                    f"{name!r} has shape {of_a.shape} in {a_name} but {of_b.shape} in {b_name}: "
                    "they are adapters of different models"
                )
            if of_a.indices.device != of_b.indices.device:
                raise AdapterError(
                    f"{name!r} is on {of_a.indices.device} in {a_name} but on "
                    f"{of_b.indices.device} in {b_name}; bring them together with "
                    "adapter.to(device=...)"
                )
        if not check_base:
            continue
        for field in ("base_model_name_or_path", "revision"):
            one, other = a.metadata.get(field), b.metadata.get(field)
            if one and other and one != other:
                raise WrongBaseError(
                    f"{a_name} was trained on {field}={one!r} but {b_name} on {other!r}; if that "
                    "is one model under two names, pass check_base=False"
                )
        for name, of_a, of_b in common:
            if judge_together(a.metadata, b.metadata, name) == "another" and of_a == of_b:
                one, other = (x.metadata[FINGERPRINT_FIELD][name] for x in (a, b))
                raise WrongBaseError(
                    f"{a_name} and {b_name} were trained on different base models: at the same "
                    f"positions of {name!r} one recorded the base fingerprint {one}, the other "
                    f"{other}; to combine them all the same, pass check_base=False"
                )


def whole_tensors(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    whole: str | None = None,
) -> dict[str, Tensor]:
    """Return the whole tensors of the adapter called ``whole``; if None, of all, which must agree.

    What one has whole must not have a delta in another.
    """
    chosen = [at for at, name in enumerate(names) if whole in (None, name)]
    if whole is not None and len(chosen) != 1:
        raise ConfigError(
            f"whole={whole!r} is the name of {len(chosen)} of the adapters, which are called "
            f"{listed(names)}.{did_you_mean(whole, names)}"
        )
    found: dict[str, int] = {}
    for at in chosen:
        adapter = adapters[at]
        if adapter.tensors and whole is None and weights[at] != 1.0:
            raise AdapterError(
                f"{names[at]} at weight {weights[at]:g} has whole tensors "
                f"({listed(adapter.tensors)}), which have no scale; whole={names[at]!r} carries "
                "them as they are, and adapter.restrict(list(adapter)) leaves them out"
            )
        for name, tensor in adapter.tensors.items():
            other = found.setdefault(name, at)
            if not same_tensor(adapters[other].tensors[name], tensor):
                raise AdapterError(
                    f"{names[other]} and {names[at]} hold different tensors for the whole of "
                    f"{name!r}, which are not summed; say whose the result has: "
                    f"whole={names[other]!r}"
                )
    for name, at in found.items():
        for called, adapter in zip(names, adapters, strict=True):
            if name in adapter:
                raise AdapterError(
                    f"{name!r} is a whole tensor in {names[at]} and has a delta in {called}: they "
                    "do not go together; leave it out of one with adapter.restrict(...)"
                )
    return {name: adapters[at].tensors[name] for name, at in found.items()}


def derived(
    sources: Sequence[Adapter],
    deltas: Mapping[str, SparseDelta],
    tensors: Mapping[str, Tensor],
    made: Mapping[str, Any] | None,
) -> Adapter:
    """Return an adapter of these deltas and whole tensors, made of others; `record` says how."""
    first, *others = (source.metadata for source in sources)
    gone = {FUSED, FINGERPRINT_FIELD, ROUNDED_FIELD}
    if any(source.keys() != deltas.keys() for source in sources):
        gone.update(TARGET_FIELDS)
    if any(source.tensors.keys() != tensors.keys() for source in sources):
        gone.add("modules_to_save")
    same_mask = all(
        any(name in source for name in deltas)
        and all(
            name not in source or source[name].support == d.support for name, d in deltas.items()
        )
        for source in sources
    )
    if not same_mask:
        gone.update(MASK_FIELDS, ["rank_pattern"])
    result = {
        field: value
        for field, value in first.items()
        if field not in gone and all(field in o and o[field] == value for o in others)
    }
    if not same_mask:
        result["mask_type"] = FUSED
    result |= _fingerprints(sources, deltas)
    if made is not None:
        result[FUSED] = made
    return Adapter(deltas, result, tensors)


def record(
    method: str,
    sources: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Tell how an adapter was fused, in what JSON can hold.

    Of a source that was fused itself only its method is named, so that the record of a long chain
    stays short.
    """
    parts = []
    for source, name, weight in zip(sources, names, weights, strict=True):
        part = {"name": name, "weight": weight, "nnz": source.nnz}
        known = {f: source.metadata.get(f) for f in ("mask_type", "random_seed", "mask_slot")}
        part |= {field: value for field, value in known.items() if value is not None}
        made = source.metadata.get(FUSED)
        if isinstance(made, Mapping) and "method" in made:
            part["method"] = made["method"]
        parts.append(part)
    return {"method": method, **options, "from": parts, "shira": __version__}


def _fingerprints(sources: Sequence[Adapter], deltas: Mapping[str, SparseDelta]) -> dict[str, Any]:
    """Return the fingerprints that are of the result's own positions."""
    kept: dict[str, dict[str, Any]] = {FINGERPRINT_FIELD: {}, ROUNDED_FIELD: {}}
    for name, delta in deltas.items():
        for source in sources:
            known = {field: source.metadata.get(field) or {} for field in kept}
            own = name in known[FINGERPRINT_FIELD] and name in source
            if own and source[name].support == delta.support:
                for field in kept:
                    if name in known[field]:
                        kept[field][name] = known[field][name]
                break
    return {field: prints for field, prints in kept.items() if prints}
