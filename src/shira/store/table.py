# SPDX-License-Identifier: Apache-2.0
"""The table of a compact file's parameters, as a value and as JSON.

A compact file is a safetensors file whose ``__metadata__`` has two texts: ``shira``, the table as a
JSON object, and ``shira_crc32``, over the table and all data: see ``docs/file-format.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira.errors import FileFormatError, did_you_mean
from shira.store.config import check_told_of_base
from shira.store.header import FLOATS, WHOLE_DTYPES, EntryError, refusing
from shira.store.json_text import parse_object, shape_in, write_object

TABLE = "shira"
CHECKSUM = "shira_crc32"
VERSION = 2
"""The latest; a file without whole tensors is of version 1."""

WHOLE = "whole"
"""Suffix of a whole tensor's name in the file."""

LARGEST_SCALE = float.fromhex("0x1.020406p+121")
"""127 steps of it are the largest that is still finite in float32."""

CODINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gaps": ((), ("gaps",)),
    "blocks": (("block",), ("blocks", "rest")),
    "seed": (("seed", "slot", "check"), ()),
}
"""The ways to store indices: the fields of a record, and the tensors beside the values, of each."""

_VALUES = (*FLOATS, "I8")
_HEX = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class Record:
    """One parameter of a compact file; what is None is for another coding."""

    shape: tuple[int, ...]  # of the weight
    k: int  # number of entries
    values: str  # dtype of the stored values, in safetensors' words
    indices: str  # one of CODINGS
    scale: float | None = None  # of int8 values
    block: tuple[int, int] | None = None  # height and width
    seed: int | None = None  # of the mask
    slot: int | None = None
    check: str | None = None  # CRC-32 of the indices, eight hex digits


@dataclass(frozen=True)
class Table:
    """All that a file says of itself, by parameter name."""

    records: Mapping[str, Record]
    metadata: Mapping[str, Any]
    library: str  # what wrote the file: "shira 0.1.0"
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of the whole tensors


def compose(table: Table) -> str:
    """Return the table as JSON text.

    Raises:
        ConfigError: If a field of the metadata cannot stand in JSON, or could not be read again.
    """
    whole = {
        "version": 2 if table.tensors else 1,
        "library": table.library,
        "parameters": {
            name: {key: value for key, value in vars(record).items() if value is not None}
            for name, record in table.records.items()
        },
        "metadata": dict(table.metadata),
    }
    if table.tensors:
        whole["tensors"] = {
            name: {"dtype": dtype, "shape": list(shape)}
            for name, (dtype, shape) in table.tensors.items()
        }
    return write_object(whole, table.metadata, separators=(",", ":"))


def parse(text: str, path: Path, size: int) -> Table:
    """Return the checked table in a file of some size, from the text that `compose` wrote.

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
    with refusing(path, "the table"):
        _check_keys(whole, parts)
        for key, kind in parts.items():
            if not isinstance(whole[key], kind):
                raise EntryError(f"its {key} is no {kind.__name__}")
    check_told_of_base(path, whole["metadata"])
    records, tensors = {}, {}
    for name, claim in whole["parameters"].items():
        with refusing(path, f"parameter {name!r}"):
            records[name] = _record(_object(claim))
    for name, claim in whole.get("tensors", {}).items():
        with refusing(path, f"whole tensor {name!r}"):
            if name in records:
                raise EntryError("the table has entries of it as well")
            _check_keys(_object(claim), ("dtype", "shape"))
            dtype = claim["dtype"]
            if not isinstance(dtype, str) or dtype not in WHOLE_DTYPES:
                choices = ", ".join(WHOLE_DTYPES)
                raise EntryError(f"dtype is one of {choices}, not {str(dtype)[:40]!r}")
            tensors[name] = dtype, shape_in(claim["shape"])
    return Table(records, whole["metadata"], whole["library"], tensors)


def _record(claim: dict[str, Any]) -> Record:
    coding, dtype = claim.get("indices"), claim.get("values")
    if not isinstance(coding, str) or coding not in CODINGS:
        raise EntryError(
            f"unknown coding of indices {str(coding)[:40]!r}; there is {', '.join(CODINGS)}."
            f"{did_you_mean(str(coding)[:40], CODINGS)}"
        )
    scale = ("scale",) if dtype == "I8" else ()
    _check_keys(claim, ("shape", "k", "values", "indices", *CODINGS[coding][0], *scale))
    if dtype not in _VALUES:
        raise EntryError(f"values are one of {', '.join(_VALUES)}, not {str(dtype)[:40]!r}")
    shape, k = shape_in(claim["shape"]), claim["k"]
    block: Any = claim.get("block")
    if type(k) is not int or not 0 <= k <= math.prod(shape):
        raise EntryError(f"k is a number of entries of a {list(shape)} weight, not {str(k)[:40]}")
    if scale:
        _check_scale(claim["scale"])
    if coding == "blocks":
        sides = list(map(type, block)) if isinstance(block, list) else None
        if sides != [int, int] or not 0 < min(block) <= max(block) < 2**62:
            raise EntryError(f"block is [height, width], not {str(block)[:80]}")
        block = tuple(block)
    if coding == "seed":
        if [type(claim["seed"]), type(claim["slot"])] != [int, int] or claim["slot"] < 0:
            raise EntryError("seed and slot are whole numbers, the slot not negative")
        if not isinstance(claim["check"], str) or not _HEX.fullmatch(claim["check"]):
            raise EntryError(f"check is eight hex digits, not {str(claim['check'])[:40]!r}")
    return Record(**{**claim, "shape": shape, "block": block})


def _check_scale(scale: Any) -> None:
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not 0 <= scale <= LARGEST_SCALE or float(np.float32(scale)) != scale:
        raise EntryError(f"scale is a float32 from 0 to {LARGEST_SCALE}, not {str(scale)[:40]}")


def _object(claim: Any) -> dict[str, Any]:
    if not isinstance(claim, dict):
        raise EntryError("the table gives an object for each")
    return claim


def _check_keys(claim: Mapping[str, Any], known: Collection[str]) -> None:
    if missing := sorted(set(known) - set(claim)):
        raise EntryError(f"{missing[0]!r} is missing")
    if unknown := sorted(set(claim) - set(known)):
        name = unknown[0][:40]
        raise EntryError(f"unknown field {name!r}.{did_you_mean(name, known)}")
