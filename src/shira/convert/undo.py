# SPDX-License-Identifier: Apache-2.0
"""The undo file of a merge: what stood at the entries that it changed.

A safetensors file. For each tensor of the checkpoint with an entry changed:

- ``<key>.indices`` ``(k,)`` I32 (I64 from 2^31 entries on): increasing flat indices of the entries
  whose bits changed;
- ``<key>.originals`` ``(k,)`` in the tensor's own dtype: their bits before.

``__metadata__``: ``format`` is ``"shira-undo"``, ``version`` is ``"1"``, and ``tensors`` is JSON,
``{key: {"file": ..., "shape": [...], "merged": ...}}``: the file that holds the tensor, its shape,
and the fingerprint of what the merge wrote there. So an undo file is 6 bytes for each changed entry
of a bfloat16 checkpoint, and is applied only to the very checkpoint that it belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.convert.checkpoint import FLOATS
from shira.errors import FileFormatError, ShiraError
from shira.store.atomic import write_atomically
from shira.store.json_text import parse_object
from shira.store.safetensors_header import Header, open_regular, read_header, read_tensor
from shira.support import Support

FORMAT = "shira-undo"
VERSION = "1"
INDICES, ORIGINALS = ".indices", ".originals"


@dataclass(frozen=True)
class Undone:
    """What to put back into one tensor.

    Attributes:
        key: Its name in the checkpoint.
        file: The file that holds it, by its name in the checkpoint.
        support: The entries that changed.
        originals: ``(k,)`` what stood there, in the tensor's dtype.
        merged: Fingerprint of what the merge wrote.
    """

    key: str
    file: str
    support: Support
    originals: Tensor
    merged: str


def write_undo(path: str | os.PathLike[str], undone: Sequence[Undone]) -> None:
    """Write an undo file, atomically."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for one in undone:
        tensors[one.key + INDICES] = one.support.indices
        tensors[one.key + ORIGINALS] = one.originals
        about[one.key] = {
            "file": one.file,
            "shape": list(one.support.shape),
            "merged": one.merged,
        }
    metadata = {"format": FORMAT, "version": VERSION, "tensors": json.dumps(about)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(tensors, metadata=metadata))


def read_undo(path: str | os.PathLike[str]) -> list[Undone]:
    """Read and check an undo file.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, or no undo file.
    """
    with open_regular(path) as file:
        header = read_header(file, path)
        about = _about(header)
        wanted = {key + part for key in about for part in (INDICES, ORIGINALS)}
        if wanted != set(header.tensors):
            odd = sorted(wanted ^ set(header.tensors))[0]
            raise FileFormatError(f"{header.path}: tensor {odd!r} is missing or not listed")
        undone = []
        for key, told in about.items():
            try:
                if header.tensors[key + ORIGINALS].dtype not in FLOATS:
                    raise FileFormatError("originals are floating point")
                originals = read_tensor(file, header, key + ORIGINALS)
                support = Support(told["shape"], read_tensor(file, header, key + INDICES))
                if originals.shape != support.indices.shape:
                    raise FileFormatError("indices and originals come in pairs")
            except ShiraError as error:
                raise FileFormatError(f"{header.path}: tensor {key!r}: {error}") from error
            undone.append(Undone(key, told["file"], support, originals, told["merged"]))
    return undone


def _about(header: Header) -> Mapping[str, Any]:
    """What the metadata say of each tensor."""
    if header.metadata.get("format") != FORMAT:
        raise FileFormatError(f"{header.path}: not an undo file of shira merge --undo")
    if header.metadata.get("version") != VERSION:
        raise FileFormatError(
            f"{header.path}: version {header.metadata.get('version')!r} of undo files is not known "
            f"(this is {VERSION!r}); update shira"
        )
    about = parse_object(
        header.metadata.get("tensors", "").encode(), header.path, "list of tensors"
    )
    for key, told in about.items():
        good = (
            isinstance(told, dict)
            and isinstance(told.get("file"), str)
            and isinstance(told.get("merged"), str)
            and isinstance(told.get("shape"), list)
            and all(type(size) is int and size >= 0 for size in told["shape"])
        )
        if not good:
            raise FileFormatError(f"{header.path}: tensor {key!r}: file, shape and merged are told")
    return about
