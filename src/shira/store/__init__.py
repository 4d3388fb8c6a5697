# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: the formats, reading with validation, atomic writing.

`load` and `save` are what `shira.adapter.Adapter` calls; one row of `FORMATS` is one format. Below
them, ``compact_write`` and ``compact_read`` are the compact format, with ``compact_table`` (what a
file says of itself), ``gaps``, ``blocks`` and ``int8`` (its codings); ``peft_format`` reads PEFT's
format, ``peft_write`` writes it and ``peft_config`` is its JSON file; ``safetensors_header``,
``json_text`` and ``entries`` refuse invalid input; ``names`` knows the base model's side;
``atomic`` writes files; ``extract`` takes an adapter out of a live model, whose tensors ``sharded``
makes whole.

Sits above ``delta``, and above ``masks``: a compact file may hold the seed of a random mask in the
place of its indices. Imports torch, numpy, safetensors, never PEFT.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from shira.adapter import Adapter
from shira.errors import ConfigError, FileFormatError, WrongBaseError, did_you_mean
from shira.store.compact import COMPACT_NAME, CompactFile, is_compact, read_compact, write_compact
from shira.store.names import CONFIG_NAME, WEIGHTS_NAME
from shira.store.peft import (
    PeftFile,
    RawDelta,
    check_whole_shapes,
    read_peft,
    to_adapter,
    validate_against,
    write_peft,
)

__all__ = [
    "FORMATS",
    "CompactFile",
    "Format",
    "PeftFile",
    "RawDelta",
    "ShapesOf",
    "is_compact",
    "load",
    "read_compact",
    "read_peft",
    "save",
    "to_adapter",
    "validate_against",
    "write_compact",
    "write_peft",
]


ShapesOf = Callable[[Collection[str]], Mapping[str, Sequence[int]]]
"""From an adapter's parameter names to the shapes of the base's weights, of those at least."""


class _Read(Protocol):
    def __call__(self, path: Path, shapes_of: ShapesOf | None, mapped: bool) -> Adapter: ...


class _Write(Protocol):
    def __call__(
        self, adapter: Adapter, path: Path, dtype: torch.dtype | None, indices: str | None
    ) -> None: ...


class _Claims(Protocol):
    def __call__(self, path: Path) -> bool: ...


class Format(NamedTuple):
    """One way to keep an adapter on disk.

    Attributes:
        claims: Whether an existing path looks like this format; a look, not a validation.
        read: Reads and validates.
        write: Writes atomically.
    """

    claims: _Claims
    read: _Read
    write: _Write


def _read_compact(path: Path, shapes_of: ShapesOf | None, mapped: bool) -> Adapter:
    read = read_compact(path, mapped=mapped)
    if shapes_of is None:
        return read.adapter
    shapes = shapes_of(read.records)
    for name, record in read.records.items():
        if name not in shapes:
            raise FileFormatError(
                f"{read.path}: unknown target: the base model has no parameter {name!r}."
                f"{did_you_mean(name, shapes)}"
            )
        if shapes[name] != record.shape:
            raise WrongBaseError(
                f"{read.path}: wrong base: made for a {name!r} of shape {record.shape}, but here "
                f"it has {shapes[name]}"
            )
    check_whole_shapes(read.path, read.adapter.tensors, shapes)
    return read.adapter


def _write_compact(
    adapter: Adapter, path: Path, dtype: torch.dtype | None, indices: str | None
) -> None:
    if path.is_dir():
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            if (path / name).exists():
                raise ConfigError(
                    f"{path}: this folder holds an adapter in PEFT's format ({name}), beside which "
                    f"a compact one would not be found; name a file, such as "
                    f"{path.with_name(path.name + '.safetensors')}, or give format='peft'"
                )
        path = path / COMPACT_NAME
    write_compact(adapter, path, dtype, indices)


def _read_peft(path: Path, shapes_of: ShapesOf | None, mapped: bool) -> Adapter:
    file = read_peft(path)
    names = [raw.weight_name for raw in file.tensors.values()]
    return to_adapter(file, None if shapes_of is None else shapes_of(names))


def _write_peft(
    adapter: Adapter, path: Path, dtype: torch.dtype | None, indices: str | None
) -> None:
    if indices is not None:
        raise ConfigError(
            f"PEFT's format has one way to store indices, so indices={indices!r} is for "
            "format='compact'"
        )
    write_peft(adapter, path, dtype)


# Asked in this order. PEFT's format comes last and claims everything: its reader says best what is
# wrong with a path that is no adapter at all.
FORMATS: Mapping[str, Format] = {
    "compact": Format(is_compact, _read_compact, _write_compact),
    "peft": Format(lambda path: True, _read_peft, _write_peft),
}


def load(
    path: str | os.PathLike[str], *, shapes_of: ShapesOf | None = None, mapped: bool = False
) -> Adapter:
    """Read an adapter, whatever its format.

    Args:
        path: A compact file (or a folder with an ``adapter.safetensors``), a folder in PEFT's
            format, or its safetensors file.
        shapes_of: Given the adapter's parameter names, returns the shapes of the base's weights.
            Needed if the file does not record them.
        mapped: Leave a compact file's values in the file, mapped into memory; see `read_compact`.
            PEFT's format is always copied.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If it is damaged, hostile, no adapter, or shapes are needed or unlike it.
        WrongBaseError: If it records other shapes than the base has.
    """
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(where))
    chosen = next(known for known in FORMATS.values() if known.claims(where))
    return chosen.read(where, shapes_of, mapped)


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str = "compact",
    dtype: torch.dtype | None = None,
    indices: str | None = None,
) -> None:
    """Write an adapter atomically.

    Args:
        adapter: What to write.
        path: Where: a file for ``"compact"`` (in a folder that is there already, the file
            ``adapter.safetensors``), a folder for ``"peft"``.
        format: One of `FORMATS`.
        dtype: Dtype of the stored values; ``None`` keeps theirs.
        indices: How a compact file stores them; see `write_compact`.

    Raises:
        ConfigError: If there is no such format, or it cannot store ``dtype`` or ``indices`` so.
        AdapterError: If the format cannot hold the adapter.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"unknown format {format!r}; there is {', '.join(map(repr, FORMATS))}."
            f"{did_you_mean(format, FORMATS)}"
        )
    FORMATS[format].write(adapter, Path(path), dtype, indices)
