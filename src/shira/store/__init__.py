# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: the formats, reading with validation, atomic writing.

`load` and `save` are what `shira.delta.Adapter` calls; one row of `FORMATS` is one format. Below
them, ``peft_format`` reads PEFT's format, ``peft_write`` writes it and ``peft_config`` is its JSON
file; ``safetensors_header``, ``json_text`` and ``entries`` refuse what cannot be meant; ``names``
and ``base_shapes`` know the base model's side; ``atomic`` writes files; ``extract`` takes an
adapter out of a live model, whose tensors ``sharded`` makes whole. Sits above ``delta``; imports
torch, numpy, safetensors, never PEFT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from shira.delta import Adapter
from shira.errors import ConfigError, did_you_mean
from shira.store.base_shapes import Base, shapes_of
from shira.store.peft_format import (
    PeftFile,
    RawDelta,
    read_peft,
    to_adapter,
    validate_against,
)
from shira.store.peft_write import write_peft

__all__ = [
    "FORMATS",
    "Base",
    "Format",
    "PeftFile",
    "RawDelta",
    "load",
    "read_peft",
    "save",
    "shapes_of",
    "to_adapter",
    "validate_against",
    "write_peft",
]


class _Read(Protocol):
    def __call__(self, path: Path, base: Base | None) -> Adapter: ...


class _Write(Protocol):
    def __call__(self, adapter: Adapter, path: Path, dtype: torch.dtype | None) -> None: ...


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


def _read_peft(path: Path, base: Base | None) -> Adapter:
    return to_adapter(read_peft(path), None if base is None else shapes_of(base))


def _write_peft(adapter: Adapter, path: Path, dtype: torch.dtype | None) -> None:
    write_peft(adapter, path, dtype)


# Asked in this order. PEFT's format comes last and claims everything: its reader says best what is
# wrong with a path that is no adapter at all.
FORMATS: Mapping[str, Format] = {
    "peft": Format(lambda path: True, _read_peft, _write_peft),
}


def load(path: str | os.PathLike[str], *, base: Base | None = None) -> Adapter:
    """Read an adapter, whatever its format.

    Args:
        path: A folder in PEFT's format, or its safetensors file.
        base: Needed if the file does not record the shapes of the base's weights; see `shapes_of`.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If it is damaged, hostile, no adapter, or ``base`` is needed or unlike it.
        WrongBaseError: If it records other shapes than ``base`` has.
    """
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"{where}: no such file or folder")
    chosen = next(known for known in FORMATS.values() if known.claims(where))
    return chosen.read(where, base)


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str = "peft",
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter atomically.

    Args:
        adapter: What to write.
        path: Where; a folder for ``"peft"``.
        format: One of `FORMATS`.
        dtype: Dtype of the stored values; ``None`` keeps theirs.

    Raises:
        ConfigError: If there is no such format, or it cannot store ``dtype``.
        AdapterError: If the format cannot hold the adapter.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"unknown format {format!r}; there is {', '.join(map(repr, FORMATS))}."
            f"{did_you_mean(format, FORMATS)}"
        )
    FORMATS[format].write(adapter, Path(path), dtype)
