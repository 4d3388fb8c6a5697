# SPDX-License-Identifier: Apache-2.0
"""The base model's values: how a delta is added to them, and how a base is known again.

An adapter records, for each parameter, a hash of the base's values at its entries in the dtype that
the base had. `judge` holds a base against that, in whatever dtype it is; every place that loads an
adapter asks it, and nothing else decides whether a base is the right one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from shira.errors import WrongBaseError

FINGERPRINT_FIELD = "base_fingerprint"
"""Metadata: ``{parameter name: fingerprint of the base's values at the entries}``."""

ROUNDED_FIELD = "base_fingerprint_rounded"
"""Metadata: ``{parameter name: [fingerprints of the same values rounded to other dtypes]}``."""

Verdict = Literal[
    "same", "same after rounding", "another", "cannot be told", "not recorded", "untrained"
]
"""The answer of `judge`: is a base the one that an adapter was made on?"""

_FLOATS = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_ADDED = frozenset(_FLOATS.values())
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype for adding deltas to a weight: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def replacement(base: Tensor, delta: Tensor) -> Tensor:
    """Return ``round(base + delta)``: summed in float32 (float64 if either is), rounded once."""
    recorded = torch.is_grad_enabled() and (base.requires_grad or delta.requires_grad)
    if not recorded and base.shape == delta.shape and {base.dtype, delta.dtype} <= _ADDED:
        # The same values in one pass: torch adds in the wider of the two, float32 at the least.
        return torch.add(base, delta, out=torch.empty_like(base))
    return differentiable_replacement(base, delta)


def differentiable_replacement(base: Tensor, delta: Tensor) -> Tensor:
    """Return what `replacement` does, by ops that can be differentiated in every way."""
    wide = accumulation_dtype(base.dtype, delta.dtype)
    return (base.to(wide) + delta.to(wide)).to(base.dtype)


def fingerprint(values: Tensor) -> str:
    """Return a short hash of base values, to know the base by: ``"<dtype>:<16 hex digits>"``."""
    raw = values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return f"{str(values.dtype).removeprefix('torch.')}:{digest}"


def fingerprint_fields(base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what an adapter's metadata records of its base's values at the entries, by parameter.

    Beside the hash of the values themselves it has the hashes of the values rounded to the
    narrower dtypes in which models are loaded, for a copy of the base in one of those does not
    show the exact values any more.
    """
    exact, rounded = {}, {}
    for name, values in base.items():
        values = values.detach().cpu()
        exact[name] = fingerprint(values)
        others = [d for d in _NARROW if _loses(values.dtype, d)]
        if others:
            rounded[name] = [fingerprint(values.to(dtype)) for dtype in others]
    fields = {FINGERPRINT_FIELD: exact, ROUNDED_FIELD: rounded}
    return {field: told for field, told in fields.items() if told}


def judge(metadata: Mapping[str, Any], name: str, values: Tensor, held: Tensor | None) -> Verdict:
    """Tell whether a base holds the values that an adapter was made on.

    A base of the recorded dtype is compared as it is, one of a wider dtype after rounding to it. A
    copy in a narrower dtype is compared with the hash of the rounded values, if that is recorded.
    Of float16 and bfloat16 neither holds all values of the other: a base in the one can be found
    the same as one recorded in the other, but a difference does not show that it is another, as
    both may be rounded from one float32 base.

    Args:
        metadata: The adapter's, with `FINGERPRINT_FIELD` and `ROUNDED_FIELD`.
        name: The parameter.
        values: ``(k,)`` its deltas.
        held: ``(k,)`` the base's values at its entries; None where they cannot be read (packed by
            quantization, on the meta device).

    Returns:
        - ``"same"``: the very values, perhaps in a wider dtype.
        - ``"same after rounding"``: one of the two is the other, rounded.
        - ``"another"``: other values.
        - ``"cannot be told"``: the values cannot be read, or not be compared.
        - ``"not recorded"``: the adapter does not record its base.
        - ``"untrained"``: a delta of zeros, instead of ``another`` or ``cannot be told``.
    """
    recorded, rounded = _recorded(metadata, name)
    if recorded is None:
        return "not recorded"
    verdict: Verdict = "cannot be told"
    if held is not None:
        there = held.detach().cpu()
        own = fingerprint(there)
        verdict = _compare(
            recorded, rounded, own, lambda dtype: fingerprint(there.to(_FLOATS[dtype]))
        )
    if verdict in ("another", "cannot be told") and not bool(values.any()):
        return "untrained"
    return verdict


def accept(
    metadata: Mapping[str, Any],
    verdicts: Mapping[str, Verdict],
    where: str,
    remedy: str,
    *,
    warn: bool = True,
) -> None:
    """Refuse (`WrongBaseError`) a base that is another one, and warn of one that cannot be told.

    The verdicts are `judge`'s. Messages begin with ``where`` and end with how to use the adapter on
    another base all the same; a caller that reports the verdicts need not warn.
    """
    base = metadata.get("base_model_name_or_path")
    told = f"; it was trained on {base!r}" if base else ""
    others = [name for name, verdict in verdicts.items() if verdict == "another"]
    if others:
        raise WrongBaseError(
            f"{where}: wrong base: {others[0]!r} does not hold the values that the adapter was "
            f"trained on (fingerprint {metadata[FINGERPRINT_FIELD][others[0]]}; {len(others)} of "
            f"{len(verdicts)} weights differ){told}. To use it all the same: {remedy}"
        )
    unknown = [name for name, verdict in verdicts.items() if verdict == "cannot be told"]
    if unknown and warn:
        warnings.warn(
            f"{where}: for {len(unknown)} of {len(verdicts)} weights, {unknown[0]!r} first, it "
            "cannot be told whether this is the base that the adapter was trained on: it is of a "
            f"dtype or packed in a way that does not show the recorded values (fingerprint "
            f"{metadata[FINGERPRINT_FIELD][unknown[0]]}){told}",
            stacklevel=3,
        )


def judge_together(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> Verdict:
    """Tell as `judge` from the metadata of two adapters with the same entries of a parameter."""
    (recorded, rounded), (own, others) = _recorded(a, name), _recorded(b, name)
    if recorded is None or own is None:
        return "not recorded"
    known = {_dtype_of(text): text for text in others}
    return _compare(recorded, rounded, own, known.get)


def _recorded(metadata: Mapping[str, Any], name: str) -> tuple[str | None, list[str]]:
    """Return the fingerprint of a parameter, None without one, and those in narrower dtypes."""
    exact, rounded = (metadata.get(field) for field in (FINGERPRINT_FIELD, ROUNDED_FIELD))
    if not isinstance(exact, Mapping) or exact.get(name) is None:
        return None, []
    narrower = rounded.get(name) if isinstance(rounded, Mapping) else None
    return str(exact[name]), [*map(str, narrower)] if isinstance(narrower, (list, tuple)) else []


def _compare(
    recorded: str, rounded: Sequence[str], own: str, in_dtype: Callable[[str], str | None]
) -> Verdict:
    """Compare the fingerprints of one base, also of it rounded, with another base's ``own``.

    ``in_dtype`` gives that of the other's values in a dtype; None if it is not known.
    """
    if own == recorded:
        return "same"
    if _dtype_of(own) == _dtype_of(recorded):
        return "another"
    made_on, dtype = _FLOATS.get(_dtype_of(recorded)), _FLOATS.get(_dtype_of(own))
    if made_on is None or dtype is None:
        return "cannot be told"
    found = in_dtype(_dtype_of(recorded))
    if found == recorded:
        return "same after rounding" if _loses(dtype, made_on) else "same"
    if own in rounded:
        return "same after rounding"
    wider = not _loses(made_on, dtype) and found is not None
    narrower = not _loses(dtype, made_on) and _dtype_of(own) in map(_dtype_of, rounded)
    return "another" if wider or narrower else "cannot be told"


def _dtype_of(text: str) -> str:
    return text.partition(":")[0]


def _loses(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether a cast from ``source`` to ``target`` can change values."""
    return source in _FLOATS.values() and torch.promote_types(source, target) != target
