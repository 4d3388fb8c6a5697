# SPDX-License-Identifier: Apache-2.0
"""``adapter_config.json``: reading what is there, composing what is written.

Beside PEFT's own fields shira writes ``shira_shapes`` (``{parameter name: [sizes]}``, so that the
file can be read without the base) and keeps the two fields of
``shira.base`` that tell of the base. Stock PEFT names the fields that it does not know and ignores
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shira.base import FINGERPRINT_FIELD, ROUNDED_FIELD
from shira.errors import ConfigError, FileFormatError
from shira.store.header import COORDINATE_LIMIT, refusing
from shira.store.json_text import read_object, shape_in, write_object
from shira.store.patterns import check_pattern, check_patterns
from shira.support import matrix_shape

SHAPES_FIELD = "shira_shapes"

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
    _check_shapes(path, config.get(SHAPES_FIELD))
    check_fingerprints(path, config)
    return config


def recorded_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the base weights that the config records, by parameter name."""
    shapes = config.get(SHAPES_FIELD)
    return None if shapes is None else {name: tuple(sizes) for name, sizes in shapes.items()}


def compose_config(
    shapes: Mapping[str, tuple[int, ...]],
    counts: Mapping[str, int],
    given: Mapping[str, Any],
    whole: Sequence[str] = (),
) -> str:
    """Return the text of a config that fits an adapter.

    Args:
        shapes: Of the base weights, by parameter name.
        counts: Entries in each, by the same names.
        given: What is known already; kept where it is true of the adapter. ``r`` is corrected if
            all weights agree on another, ``target_modules`` if it does not match every weight, and
            ``modules_to_save`` if it does not name just the modules of the whole tensors.
        whole: Names of the whole tensors.

    Raises:
        ConfigError: If a given field cannot stand in JSON, contradicts the adapter, or is a pattern
            that could take minutes to match.
    """
    config = dict(given)
    check_patterns(config)
    if config.get("peft_type", "SHIRA") != "SHIRA":
        raise ConfigError(f"peft_type is 'SHIRA' in a SHiRA adapter, not {config['peft_type']!r}")
    config["peft_type"] = "SHIRA"
    config.setdefault("base_model_name_or_path", None)
    config.setdefault("task_type", None)
    config.setdefault("inference_mode", True)
    config["modules_to_save"] = _modules_of(whole, config.get("modules_to_save"))
    config["r"] = common_rank(shapes, counts, config.get("r"))
    modules = [name.removesuffix(".weight") for name in shapes]
    if not _matches_all(config.get("target_modules"), modules):
        config["target_modules"] = sorted(modules)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if config.get(field) is not None:
                config[field] = None
    config[SHAPES_FIELD] = {name: list(shape) for name, shape in shapes.items()}
    return write_object(config, config, indent=2, sort_keys=True) + "\n"


def common_rank(
    shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], given: Any
) -> int:
    """Return the r with k = r (m + n) in every weight, else the given one, else an average."""
    spans = [sum(matrix_shape(shape)) for shape in shapes.values()]
    ranks = {k / span for k, span in zip(counts.values(), spans, strict=True) if span}
    if len(ranks) == 1 and (rank := ranks.pop()).is_integer() and rank >= 1:
        return int(rank)
    if isinstance(given, int):
        return given
    return max(1, round(sum(counts.values()) / max(1, sum(spans))))


def _modules_of(whole: Sequence[str], given: Any) -> list[str] | None:
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


def _check_shapes(path: Path, shapes: Any) -> None:
    if shapes is None:
        return
    if not isinstance(shapes, dict):
        raise FileFormatError(f"{path}: {SHAPES_FIELD} maps parameter names to shapes")
    for name, sizes in shapes.items():
        with refusing(path, f"{SHAPES_FIELD} of {name!r}"):
            shape_in(sizes)
        if max(matrix_shape(sizes)) > COORDINATE_LIMIT:
            raise FileFormatError(
                f"{path}: {SHAPES_FIELD} of {name!r} overflows int32 coordinates: {str(sizes)[:80]}"
            )


def check_fingerprints(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse fingerprints of the base that are no mapping of names to them; None is none.

    Raises:
        FileFormatError: If they are not.
    """
    for field, several in ((FINGERPRINT_FIELD, False), (ROUNDED_FIELD, True)):
        fingerprints = metadata.get(field)
        if fingerprints is None:
            continue
        if not isinstance(fingerprints, dict):
            raise FileFormatError(f"{path}: {field} maps parameter names to fingerprints")
        for name, told in fingerprints.items():
            texts = told if several and isinstance(told, list) else [told]
            if not all(isinstance(text, str) and _FINGERPRINT.fullmatch(text) for text in texts):
                raise FileFormatError(
                    f"{path}: {field} of {name!r} is '<dtype>:<16 hex digits>'"
                    f"{', or a list of such' if several else ''}, not {str(told)[:80]!r}"
                )
