# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: the formats, reading with validation, atomic writing.

`load` and `save` are what `shira.adapter.Adapter` calls.
``compact`` is the compact format, ``table`` what such a file says of itself; ``peft`` is PEFT's
format, ``config`` its JSON file, ``patterns`` the regular expressions in it. Below them ``header``
and ``json_text`` refuse invalid input, ``names`` knows the base model's side, and ``atomic`` writes
files; ``extract`` takes an adapter out of a live model.

Sits above ``delta``, ``ops`` and ``masks``: a compact file may hold the seed of a random mask in
the place of its indices. Imports torch, numpy, safetensors, never PEFT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from shira.adapter import Adapter
from shira.errors import ConfigError, did_you_mean
from shira.store.compact import COMPACT_NAME, CompactFile, is_compact, read_compact, write_compact
from shira.store.config import TIED_FIELD
from shira.store.names import CONFIG_NAME, WEIGHTS_NAME
from shira.store.peft import (
    PeftFile,
    RawDelta,
    check_shape,
    check_whole_shapes,
    read_peft,
    to_adapter,
    validate_against,
    write_peft,
)

__all__ = [
    "FORMATS",
    "CompactFile",
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

FORMATS = ("compact", "peft")
"""The ways to keep an adapter on disk."""

ShapesOf = Callable[[Collection[str]], Mapping[str, Sequence[int]]]
"""From an adapter's parameter names to the shapes of the base's weights, of those at least."""


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
    if not is_compact(Path(path)):  # PEFT's reader says best what is wrong with what is no adapter
        file = read_peft(path)
        names = [raw.weight_name for raw in file.tensors.values()]
        return to_adapter(file, None if shapes_of is None else shapes_of(names))
    read = read_compact(path, mapped=mapped)
    if shapes_of is not None:
        tied = read.adapter.metadata.get(TIED_FIELD)
        twins = tied if isinstance(tied, Mapping) else {}
        twins = {name: twins[name] for name in read.records if twins.get(name) in read.records}
        # a checkpoint may hold one of the two alone
        shapes = dict(shapes_of(read.records.keys() - twins.keys()))
        for name, twin in twins.items():
            shapes.setdefault(name, shapes[twin])
        for name, record in read.records.items():
            check_shape(f"{read.path}", name, record.shape, shapes)
        check_whole_shapes(read.path, read.adapter.tensors, shapes)
    return read.adapter


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
    where = Path(path)
    if format == "compact":
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            if (where / name).exists():
                raise ConfigError(
                    f"{where}: this folder holds an adapter in PEFT's format ({name}), beside "
                    "which a compact one would not be found; name a file, such as "
                    f"{where.with_name(where.name + '.safetensors')}, or give format='peft'"
                )
        write_compact(adapter, where / COMPACT_NAME if where.is_dir() else where, dtype, indices)
        return
    if indices is not None:
        raise ConfigError(
            f"PEFT's format has one way to store indices, so indices={indices!r} is for "
            "format='compact'"
        )
    write_peft(adapter, path, dtype)
