# SPDX-License-Identifier: Apache-2.0
"""Writing the compact format: one safetensors file, specified in ``docs/file-format.md``.

Of each parameter's indices the file keeps what takes least: nothing but the seed where the
adapter's metadata name a random mask that gives these very indices, the numbers of blocks where the
support is made of blocks, else gaps. Everything is worked out, and refused if it cannot be stored,
before the first byte is written.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira import blocks
from shira._version import __version__
from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, MaskError, did_you_mean
from shira.masks.random import random_support
from shira.ops import gaps
from shira.store import int8
from shira.store.atomic import check_kind, write_atomically
from shira.store.compact_table import CHECKSUM, CODINGS, TABLE, WHOLE, Record, Table, compose
from shira.store.entries import WHOLE_DTYPES, EntryError, check_values, check_whole
from shira.support import Support

_VALUES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int8: "I8",
}  # fmt: skip
_WHOLE = {dtype: name for name, dtype in WHOLE_DTYPES.items()}
_UNITS = {dtype: name for name, dtype in gaps.UNITS.items()}

Array = NDArray[Any]


def write_compact(
    adapter: Adapter,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    indices: str | None = None,
) -> None:
    """Write an adapter in the compact format; nothing is written if anything is wrong with it.

    Args:
        adapter: What to write.
        path: The file; folders above it are made if absent.
        dtype: Dtype of the stored values: ``torch.float64``, ``float32``, ``float16``,
            ``bfloat16``, or ``int8`` with a scale for each parameter. ``None`` keeps theirs. Whole
            tensors keep theirs always.
        indices: ``"gaps"``, ``"blocks"`` or ``"seed"`` to store all indices in that way; ``None``
            takes the smallest for each parameter.

    Raises:
        ConfigError: If the dtype or the way is none of these, the path is a folder, or a field of
            the metadata cannot stand in JSON.
        AdapterError: If a value is not finite in ``dtype``, a whole tensor has a dtype that models
            do not keep, or the indices of a parameter are not
            made of blocks or by the recorded seed, where that was asked for.
    """
    target = Path(path)
    check_kind(target)
    if dtype is not None and dtype not in _VALUES:
        raise ConfigError(f"dtype is one of {', '.join(map(str, _VALUES))}, not {dtype}")
    if indices is not None and indices not in CODINGS:
        raise ConfigError(
            f"indices are stored as one of {', '.join(CODINGS)}, not {indices!r}."
            f"{did_you_mean(str(indices), CODINGS)}"
        )
    records: dict[str, Record] = {}
    tensors: dict[str, tuple[str, Array]] = {}
    for name, delta in adapter.items():
        fields, parts = _coded_indices(name, delta.support, adapter.metadata, indices)
        values, scale = _stored_values(name, delta, dtype)
        records[name] = Record(
            shape=delta.support.shape,
            k=delta.nnz,
            values=values[0],
            scale=scale,
            **fields,
        )
        tensors[f"{name}.values"] = values
        for kind, units in parts.items():
            tensors[f"{name}.{kind}"] = (_UNITS[units.dtype], units)
    for name, tensor in adapter.tensors.items():
        stored = stored_whole(name, tensor)
        tensors[f"{name}.{WHOLE}"] = (_WHOLE[stored.dtype], _array(stored))
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    whole = {name: (tensors[f"{name}.{WHOLE}"][0], shape) for name, shape in shapes.items()}
    table = compose(Table(records, adapter.metadata, f"shira {__version__}", whole))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, *_file(table, tensors))


def crc_of(indices: Tensor) -> str:
    """CRC-32 of indices as little-endian int32 or int64: eight hex digits."""
    return f"{zlib.crc32(_bytes(indices.cpu().numpy())):08x}"


def _coded_indices(
    name: str, support: Support, metadata: Mapping[str, Any], way: str | None
) -> tuple[dict[str, Any], dict[str, gaps.Units]]:
    """Fields of the record and the tensors that stand for the indices."""
    flat = support.indices.cpu().numpy()
    if way in (None, "seed") and (fields := _seed_of(name, support, metadata)):
        return fields, {}
    if way in (None, "blocks") and (found := blocks.find_blocks(support.shape, flat)):
        parts = {"blocks": gaps.encode(found.numbers)}
        if len(found.rest):
            parts["rest"] = gaps.encode(found.rest)
        return {"indices": "blocks", "block": found.size}, parts
    if way in (None, "gaps"):
        return {"indices": "gaps"}, {"gaps": gaps.encode(flat)}
    why = (
        "they are not made of whole blocks"
        if way == "blocks"
        else "the metadata's mask_type, random_seed and mask_slot do not give these indices"
    )
    raise AdapterError(f"{name!r}: the indices cannot be stored as {way}: {why}")


def _seed_of(name: str, support: Support, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a random mask, if the metadata's gives exactly this support."""
    seed, slot = metadata.get("random_seed"), metadata.get("mask_slot") or 0
    if metadata.get("mask_type") != "random" or type(seed) is not int or type(slot) is not int:
        return None
    try:
        made = random_support(support.shape, support.nnz, seed=seed, name=name, slot=slot)
    except MaskError:
        return None
    if not torch.equal(made.indices, support.indices.cpu()):
        return None
    return {"indices": "seed", "seed": seed, "slot": slot, "check": crc_of(made.indices)}


def stored_whole(name: str, tensor: Tensor) -> Tensor:
    """Return a whole tensor as a file holds it: contiguous and on the CPU.

    Raises:
        AdapterError: If its dtype cannot be stored, or a value is not finite.
    """
    stored = tensor.detach().cpu().contiguous()
    try:
        check_whole(name, stored)
    except EntryError as error:
        raise AdapterError(f"{name!r}: {error}") from error
    return stored


def _stored_values(
    name: str, delta: SparseDelta, dtype: torch.dtype | None
) -> tuple[tuple[str, Array], float | None]:
    values = delta.values.detach().cpu()
    if dtype is None and values.dtype not in _VALUES:
        raise AdapterError(
            f"values of {name!r} are {values.dtype}; give dtype= to store them in one of "
            f"{', '.join(map(str, _VALUES))}"
        )
    scale = None
    try:
        if dtype == torch.int8:
            check_values(values.to(torch.float32))
            values, scale = int8.quantize(values)
        else:
            values = values.to(dtype or values.dtype).contiguous()
            check_values(values)
    except EntryError as error:
        hint = "" if dtype is None else f" when stored as {dtype}"
        raise AdapterError(f"{name!r}: {error}{hint}") from error
    return (_VALUES[values.dtype], _array(values)), scale


def _array(tensor: Tensor) -> Array:
    """Return the tensor as an array; of bfloat16, which numpy lacks, the array of its bits."""
    array: Array = tensor.view(
        torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype
    ).numpy()
    return array


def _file(table: str, tensors: Mapping[str, tuple[str, Array]]) -> list[bytes | memoryview]:
    """The parts of the file: header, then the data, widest elements first so that all align."""
    data = {name: _bytes(array) for name, (_, array) in tensors.items()}
    checksum = zlib.crc32(table.encode())
    for raw in data.values():
        checksum = zlib.crc32(raw, checksum)
    header: dict[str, Any] = {"__metadata__": {TABLE: table, CHECKSUM: f"{checksum:08x}"}}
    order = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
    at = 0
    for name in order:
        dtype, array = tensors[name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(data[name] for name in order)]


def _bytes(array: Array) -> memoryview:
    """The little-endian bytes of an array, without a copy where they are that already."""
    little = array.dtype.newbyteorder("<") if sys.byteorder == "big" else array.dtype
    return np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data
