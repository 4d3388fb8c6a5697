# SPDX-License-Identifier: Apache-2.0
"""What a compact file says of itself: the table of its parameters, as a value and as JSON.

A compact file is a safetensors file whose ``__metadata__`` has two texts: ``shira``, the table as a
JSON object, and ``shira_crc32``, over the table and all data. ``docs/file-format.md`` specifies
both. ``compact_write`` composes a table, ``compact_read`` parses one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shira.errors import ConfigError, FileFormatError, did_you_mean
from shira.store.entries import WHOLE_DTYPES
from shira.store.int8 import LARGEST_SCALE
from shira.store.json_text import check_readable, parse_object, shape_in
from shira.store.peft_config import check_fingerprints

TABLE = "shira"
CHECKSUM = "shira_crc32"
VERSION = 2
"""The latest; a file without whole tensors is of version 1."""

WHOLE = "whole"
"""Suffix of a whole tensor's name in the file."""

VALUE_DTYPES = ("F64", "F32", "F16", "BF16", "I8")
CODINGS: Mapping[str, tuple[str, ...]] = {
    "gaps": ("gaps",),
    "blocks": ("blocks", "rest"),
    "seed": (),
}
"""The ways to store indices, each with the tensors it uses beside the values."""

_OF_CODING = {"gaps": set(), "blocks": {"block"}, "seed": {"seed", "slot", "check"}}
_HEX = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class Record:
    """One parameter of a compact file.

    Attributes:
        shape: Of the weight.
        k: How many entries.
        values: Dtype of the stored values, in safetensors' words.
        indices: One of `CODINGS`.
        scale: Of int8 values; None for others.
        block: Height and width of a block, for ``"blocks"``.
        seed: Of the mask, for ``"seed"``.
        slot: Of the mask, for ``"seed"``.
        check: CRC-32 of the indices, eight hex digits, for ``"seed"``.
    """

    shape: tuple[int, ...]
    k: int
    values: str
    indices: str
    scale: float | None = None
    block: tuple[int, int] | None = None
    seed: int | None = None
    slot: int | None = None
    check: str | None = None

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Table:
    """All that a file says of itself.

    Attributes:
        records: By parameter name.
        metadata: The adapter's.
        library: What wrote the file: ``"shira 0.1.0"``.
        tensors: Dtype, in safetensors' words, and shape of each whole tensor, by parameter name.
    """

    records: Mapping[str, Record]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    library: str = ""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


def compose(table: Table) -> str:
    """The table as JSON text.

    Raises:
        ConfigError: If a field of the metadata cannot stand in JSON, or could not be read again.
    """
    for name, value in table.metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"field {name!r} of the adapter's metadata cannot be written as JSON: {error}"
            ) from error
    parameters = {
        name: {key: value for key, value in vars(record).items() if value is not None}
        for name, record in table.records.items()
    }
    whole = {
        "version": 2 if table.tensors else 1,
        "library": table.library,
        "parameters": parameters,
        "metadata": dict(table.metadata),
    }
    if table.tensors:
        whole["tensors"] = {
            name: {"dtype": dtype, "shape": list(shape)}
            for name, (dtype, shape) in table.tensors.items()
        }
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    check_readable(text)
    return text


def parse(text: str, path: Path, size: int) -> Table:
    """The checked table in a file.

    Args:
        text: As `compose` wrote it.
        path: The file, for messages.
        size: Of the file in bytes.

    Raises:
        FileFormatError: If it is of a later version, or not what the specification says.
    """
    whole = parse_object(text, path, "table", size)
    version = whole.get("version")
    if type(version) is not int or version < 1:
        raise FileFormatError(f"{path}: the table's version is a whole number, not {version!r}")
    if version > VERSION:
        raise FileFormatError(
            f"{path}: format version {version} is later than {VERSION}, the last that this shira "
            f"reads (it was written by {str(whole.get('library'))[:40]!r}); install a newer shira"
        )
    parts = {"version": int, "library": str, "parameters": dict, "metadata": dict}
    if version > 1:
        parts["tensors"] = dict
    _check_keys(path, "the table", whole, set(parts), set(parts))
    for key, kind in parts.items():
        if not isinstance(whole[key], kind):
            raise FileFormatError(f"{path}: the table's {key} is no {kind.__name__}")
    check_fingerprints(path, whole["metadata"])
    records = {name: _record(path, name, claim) for name, claim in whole["parameters"].items()}
    tensors = {
        name: _whole(path, name, claim, records) for name, claim in whole.get("tensors", {}).items()
    }
    return Table(records, whole["metadata"], whole["library"], tensors)


def _whole(
    path: Path, name: str, claim: Any, records: Mapping[str, Record]
) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a whole tensor."""
    where = f"whole tensor {name!r}"
    if not isinstance(claim, dict):
        raise FileFormatError(f"{path}: {where}: the table gives an object for each")
    _check_keys(path, where, claim, {"dtype", "shape"}, {"dtype", "shape"})
    dtype = claim["dtype"]
    if not isinstance(dtype, str) or dtype not in WHOLE_DTYPES:
        raise FileFormatError(
            f"{path}: {where}: dtype is one of {', '.join(WHOLE_DTYPES)}, not {str(dtype)[:40]!r}"
        )
    try:
        shape = shape_in(claim["shape"])
    except ValueError as error:
        raise FileFormatError(f"{path}: {where}: {error}") from error
    if name in records:
        raise FileFormatError(f"{path}: {where}: the table has entries of it as well")
    return dtype, shape


def _record(path: Path, name: str, claim: Any) -> Record:
    where = f"parameter {name!r}"

    def refuse(cause: str) -> FileFormatError:
        return FileFormatError(f"{path}: {where}: {cause}")

    if not isinstance(claim, dict):
        raise refuse("the table gives an object for each parameter")
    coding = claim.get("indices")
    if not isinstance(coding, str) or coding not in CODINGS:
        raise refuse(
            f"unknown coding of indices {str(coding)[:40]!r}; there is {', '.join(CODINGS)}."
            f"{did_you_mean(str(coding)[:40], CODINGS)}"
        )
    needed = {"shape", "k", "values", "indices"} | _OF_CODING[coding]
    dtype = claim.get("values")
    if dtype == "I8":
        needed.add("scale")
    _check_keys(path, where, claim, needed, needed)
    if dtype not in VALUE_DTYPES:
        raise refuse(f"values are one of {', '.join(VALUE_DTYPES)}, not {str(dtype)[:40]!r}")
    try:
        shape, k = shape_in(claim["shape"]), claim["k"]
    except ValueError as error:
        raise refuse(str(error)) from error
    if not _is_count(k) or k > math.prod(shape):
        raise refuse(f"k is a number of entries of a {list(shape)} weight, not {str(k)[:40]}")
    if "scale" in claim:
        _check_scale(claim["scale"], refuse)
    block = None
    if coding == "blocks":
        try:
            block = _block_size(claim["block"])
        except ValueError as error:
            raise refuse(str(error)) from error
    if coding == "seed":
        if type(claim["seed"]) is not int or not _is_count(claim["slot"]):
            raise refuse("seed and slot are whole numbers, the slot not negative")
        if not isinstance(claim["check"], str) or not _HEX.fullmatch(claim["check"]):
            raise refuse(f"check is eight hex digits, not {str(claim['check'])[:40]!r}")
    return Record(**{**claim, "shape": shape, "block": block})


def _check_scale(scale: Any, refuse: Any) -> None:
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not 0 <= scale <= LARGEST_SCALE or float(np.float32(scale)) != scale:
        raise refuse(f"scale is a float32 from 0 to {LARGEST_SCALE}, not {str(scale)[:40]}")


def _block_size(size: object) -> tuple[int, int]:
    """Return the height and width of a block as a file gives them.

    Raises:
        ValueError: If they are no two positive integers that a weight could have.
    """
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and 0 < n < 2**62 for n in size)
    ):
        raise ValueError(f"block is [height, width], not {str(size)[:80]}")
    return size[0], size[1]


def _check_keys(
    path: Path, where: str, claim: Mapping[str, Any], needed: set[str], known: set[str]
) -> None:
    if missing := sorted(needed - set(claim)):
        raise FileFormatError(f"{path}: {where}: {missing[0]!r} is missing")
    if unknown := sorted(set(claim) - known):
        raise FileFormatError(
            f"{path}: {where}: unknown field {unknown[0][:40]!r}."
            f"{did_you_mean(unknown[0][:40], known)}"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
