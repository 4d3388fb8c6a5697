# SPDX-License-Identifier: Apache-2.0
"""A base model's checkpoint on disk: safetensors in one file or several, known by their headers.

Which tensors there are, in which file, at which byte; no tensor is read here. A folder's files are
those that its ``*.safetensors.index.json`` lists; without one ``model.safetensors``, and without
that every safetensors file, if no name occurs twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shira.errors import FileFormatError
from shira.store.json_text import parse_object
from shira.store.safetensors_header import header_of, open_regular

FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What safetensors calls the dtypes that a delta can be added to."""

_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDEX_LIMIT = 200_000_000  # bytes; 100 is about one entry


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Attributes:
        key: Its name in the checkpoint.
        file: The file that holds it.
        dtype: In safetensors' words: ``"BF16"``.
        shape: Its shape.
        start: Its first byte in the file.
        end: The byte behind its last.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: The folder, or the one file.
        files: The safetensors files that make it up.
        tensors: Where each tensor lies, by its name.
        config: What ``config.json`` beside them says; empty where there is none.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max((t.end - t.start for t in self.tensors.values()), default=0)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Look at a checkpoint: headers, index and config, no tensors.

    Args:
        path: A folder, or one safetensors file.

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or a file that the index lists is not.
        FileFormatError: If there is no safetensors checkpoint, a file is damaged, two of them hold
            a tensor of one name, or the index does not fit the files.
    """
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(2, "no such file or folder", str(where))
    index = _index_of(where) if where.is_dir() else None
    files = _files_of(where, index)
    tensors: dict[str, Stored] = {}
    for file in files:
        for key, info in header_of(file).tensors.items():
            if key in tensors:
                raise FileFormatError(
                    f"{where}: both {tensors[key].file.name} and {file.name} hold {key!r}; give "
                    "the one file that is meant"
                )
            tensors[key] = Stored(key, file, info.dtype, info.shape, info.start, info.end)
    if index is not None:
        _check_index(where, index, tensors)
    folder = where if where.is_dir() else where.parent
    return Checkpoint(where, files, tensors, _config_of(folder / "config.json"))


def _index_of(folder: Path) -> dict[str, str] | None:
    """Name of the file of each tensor, if the folder has an index."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return None
    if len(found) > 1:
        raise FileFormatError(
            f"{folder}: there are {len(found)} indices of safetensors files, "
            f"{', '.join(file.name for file in found)}; keep the one that is meant"
        )
    with open_regular(found[0]) as opened:
        if os.fstat(opened.fileno()).st_size > _INDEX_LIMIT:
            raise FileFormatError(f"{found[0]}: too large for an index (limit {_INDEX_LIMIT})")
        whole = parse_object(opened.read(), found[0], "index")
    placed = whole.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FileFormatError(f"{found[0]}: weight_map maps the tensors' names to their files")
    for key, name in placed.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", "..", "."):
            raise FileFormatError(f"{found[0]}: {key!r}: {name!r} is no file beside the index")
    return placed


def _files_of(path: Path, index: Mapping[str, str] | None) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    if index is not None:
        return tuple(path / name for name in sorted(set(index.values())))
    for name in _WHOLE:
        if (path / name).exists():
            return (path / name,)
    found = tuple(sorted(path.glob("*.safetensors")))
    if not found:
        raise FileFormatError(f"{path}: the folder has no safetensors checkpoint")
    return found


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    for key, name in index.items():
        if key not in tensors:
            raise FileFormatError(f"{path}: the index lists {key!r} in {name}, which lacks it")
        if tensors[key].file.name != name:
            raise FileFormatError(
                f"{path}: the index lists {key!r} in {name}, but it is in {tensors[key].file.name}"
            )


def _config_of(file: Path) -> Mapping[str, Any]:
    """The config beside a checkpoint; it only serves hints, so a damaged one counts as none."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
