# SPDX-License-Identifier: Apache-2.0
"""``adapter_config.json``: reading what is there, composing what is written.

Beside PEFT's own fields shira writes ``shira_shapes`` (``{parameter name: [sizes]}``, so that the
file can be read without the base) and keeps the two fields of
``shira.base`` that tell of the base. Stock PEFT names the fields that it does not know and ignores
them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shira.adapter import Adapter
from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD
from shira.errors import ConfigError, FileFormatError
from shira.store.header import COORDINATE_LIMIT, refusing
from shira.store.json_text import read_object, shape_in, write_object
from shira.store.names import is_parameter, stack_of
from shira.store.patterns import check_pattern, check_patterns
from shira.support import matrix_shape

SHAPES_FIELD = "shira_shapes"

TIED_FIELD = "tied_weights"
"""``{parameter name: that of the parameter it is one with}``, where both have the same delta.

In PEFT's format the second's alone is stored; an `Adapter` has it under both names, so that it is
right for a base in which they are one weight, and for one in which they are two.
"""

CONFIG_LIMIT = 50_000_000
"""Bytes of a config, at most; shapes and fingerprints of 100,000 weights take about 20 MB."""

_FINGERPRINT = re.compile(r"[a-z0-9_]+:[0-9a-f]{16}")


def read_config(path: Path) -> dict[str, Any]:
    """Return the checked config of a SHiRA adapter.

    Raises:
        FileFormatError: If it is not JSON, of another PEFT method, or shira's own fields in it are
            malformed.
    """
    config = read_object(path, "config", CONFIG_LIMIT)
    peft_type = config.get("peft_type")
    if peft_type != "SHIRA":
        hint = "; shira convert makes one of a LoRA" if peft_type == "LORA" else ""
        raise FileFormatError(
            f"{path}: peft_type is {peft_type!r}, not 'SHIRA': not a SHiRA adapter{hint}"
        )
    with refusing(path, "the config"):
        check_patterns(config)
    shapes = {} if config.get(SHAPES_FIELD) is None else config[SHAPES_FIELD]
    if not isinstance(shapes, dict):
        raise FileFormatError(f"{path}: {SHAPES_FIELD} maps parameter names to shapes")
    for name, sizes in shapes.items():
        with refusing(path, f"{SHAPES_FIELD} of {name!r}"):
            if max(matrix_shape(shape_in(sizes))) > COORDINATE_LIMIT:
                raise ValueError(f"{str(sizes)[:80]} overflows int32 coordinates")
    check_told_of_base(path, config)
    return config


def with_tied_fingerprints(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata that know the base under every name of a tied weight."""
    result = dict(metadata)
    for field in (FINGERPRINT_FIELD, ROUNDED_FIELD):
        told = metadata.get(field) or {}
        tied = metadata.get(TIED_FIELD) or {}
        more = {name: told[owner] for name, owner in tied.items() if owner in told}
        if more:
            result[field] = {**more, **told}
    return result


def compose_config(adapter: Adapter, given: Mapping[str, Any]) -> str:
    """Return the text of a config that fits an adapter.

    What is ``given`` is kept where it is true of the adapter. ``r`` is corrected if all weights
    agree on another, ``target_modules`` if it does not match every module's weight,
    ``target_parameters`` if it does not every other parameter, and ``modules_to_save`` if it does
    not name just the modules of the whole tensors.

    Raises:
        ConfigError: If a given field cannot stand in JSON, contradicts the adapter, or is a pattern
            that could take minutes to match.
    """
    check_patterns(given)
    if given.get("peft_type", "SHIRA") != "SHIRA":
        raise ConfigError(f"peft_type is 'SHIRA' in a SHiRA adapter, not {given['peft_type']!r}")
    shapes = {name: delta.support.shape for name, delta in adapter.items()}
    counts = {name: delta.nnz for name, delta in adapter.items()}
    parameters = parameters_of(shapes, given.get("target_parameters"))
    config = {
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        **given,
        "peft_type": "SHIRA",
        "modules_to_save": _modules_of(adapter.tensors, given.get("modules_to_save")),
        "r": common_rank(shapes, counts, given.get("r"), parameters),
        SHAPES_FIELD: {name: list(shape) for name, shape in shapes.items()},
    }
    if parameters or config.get("target_parameters"):
        named = target_parameters_in(config)
        matched = all(is_parameter(name, named) for name in parameters)
        config["target_parameters"] = sorted(named if parameters and matched else parameters)
    modules = [name.removesuffix(".weight") for name in shapes if name not in parameters]
    if not _matches_all(config.get("target_modules"), modules):
        config["target_modules"] = sorted(modules)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if config.get(field) is not None:
                config[field] = None
    return write_object(config, config, indent=2, sort_keys=True) + "\n"


def parameters_of(names: Iterable[str], target_parameters: Any) -> list[str]:
    """Return those of an adapter's parameters that PEFT's format names themselves, no module.

    They are those that ``target_parameters`` names, and what is no module's ``weight``.
    """
    known = target_parameters_in({"target_parameters": target_parameters})
    return [n for n in names if not n.endswith(".weight") or is_parameter(n, known)]


def target_parameters_in(config: Mapping[str, Any]) -> list[str]:
    """Return a config's ``target_parameters``; nothing, if they are no list."""
    given = config.get("target_parameters")
    return [str(name) for name in given] if isinstance(given, (list, tuple, set)) else []


def common_rank(
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    given: Any,
    target_parameters: Collection[str] | None = None,
) -> int:
    """Return the r with k = r (m + n) in every weight, else the given one, else an average.

    Of a stack of matrices (see `shira.store.names.stack_of`) in each of them.
    """
    spans = []
    for name, shape in shapes.items():
        matrices, one = stack_of(name, shape, target_parameters)
        spans.append(matrices * sum(matrix_shape(one)))
    ranks = {k / span for k, span in zip(counts.values(), spans, strict=True) if span}
    if len(ranks) == 1 and (rank := ranks.pop()).is_integer() and rank >= 1:
        return int(rank)
    if isinstance(given, int):
        return given
    return max(1, round(sum(counts.values()) / max(1, sum(spans))))


def _modules_of(whole: Iterable[str], given: Any) -> list[str] | None:
    """Return the modules that PEFT has to wrap to load these tensors; the given ones if they do.

    Raises:
        ConfigError: If a tensor is the model's own, of no module in it.
    """
    known = [str(name) for name in given] if isinstance(given, (list, tuple)) else []
    used: list[str] = []
    for name in whole:
        parts = name.split(".")[:-1]
        if not parts:
            raise ConfigError(
                f"PEFT's format names modules, and the whole tensor {name!r} is of none"
            )
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        fits = [given for given in known if any(module.endswith(given) for module in above)]
        used += fits or [above[-1]]
    return list(dict.fromkeys(used)) or None


def _matches_all(targets: Any, modules: Sequence[str]) -> bool:
    """Return whether PEFT's way of matching ``target_modules`` finds each of ``modules``."""
    if isinstance(targets, str):
        try:
            check_pattern(targets, "target_modules", modules)
        except ConfigError:
            return False  # names of any length, from a file, for which the pattern takes too long
        return all(re.fullmatch(targets, module) for module in modules)
    if not isinstance(targets, (list, tuple, set, frozenset)):
        return False
    return all(
        any(module == target or module.endswith(f".{target}") for target in targets)
        for module in modules
    )


def check_told_of_base(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse fingerprints and ties of the base that are no mappings of names; None is none."""
    tied = {} if metadata.get(TIED_FIELD) is None else metadata[TIED_FIELD]
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise FileFormatError(f"{path}: {TIED_FIELD} maps parameter names to parameter names")
    for field, what in (
        (FINGERPRINT_FIELD, "'<dtype>:<16 hex digits>'"),
        (ROUNDED_FIELD, "'<dtype>:<16 hex digits>', or a list of such"),
    ):
        fingerprints = {} if metadata.get(field) is None else metadata[field]
        if not isinstance(fingerprints, dict):
            raise FileFormatError(f"{path}: {field} maps parameter names to fingerprints")
        for name, told in fingerprints.items():
            texts = told if field == ROUNDED_FIELD and isinstance(told, list) else [told]
            if not all(isinstance(text, str) and _FINGERPRINT.fullmatch(text) for text in texts):
                raise FileFormatError(
                    f"{path}: {field} of {name!r} is {what}, not {str(told)[:80]!r}"
                )
