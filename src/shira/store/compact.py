# SPDX-License-Identifier: Apache-2.0
"""The compact format: one safetensors file, specified in ``docs/file-format.md``.

Of each parameter's indices a file keeps what takes least: nothing but the seed where the adapter's
metadata name a random mask that gives these very indices, the numbers of blocks where the support
is made of blocks, else gaps. Of the values it keeps their dtype, or a byte each and a scale.
Everything is worked out, and refused if it cannot be stored, before the first byte is written.

In reading, nothing is believed: names, dtypes and sizes of all tensors are held against the table
before the first is read, counts are compared before room is made for what they count, and at the
end a checksum covers the table and all data. What is made on the way is in proportion to the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shira import blocks
from shira._version import __version__
from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, FileFormatError, MaskError, did_you_mean
from shira.masks import random_support
from shira.ops import gaps
from shira.store.atomic import check_kind, write_atomically
from shira.store.header import (
    FLOATS,
    HEADER_LIMIT,
    WHOLE_DTYPES,
    WORDS,
    Bits,
    EntryError,
    Stored,
    TensorFile,
    bytes_of,
    check_values,
    check_whole,
    open_tensors,
    read_bits,
    refusing,
    stored,
    tensor_of,
)
from shira.store.json_text import open_regular
from shira.store.names import WEIGHTS_NAME
from shira.store.table import (
    CHECKSUM,
    CODINGS,
    LARGEST_SCALE,
    TABLE,
    WHOLE,
    Record,
    Table,
    compose,
    parse,
)
from shira.support import Support

COMPACT_NAME = "adapter.safetensors"
"""The compact file in a folder that is given in its place."""

ERROR_BOUND = 0.5 + 2.0**-16
"""Largest distance of a value from what int8 makes of it, in steps of the scale: half a step, and
what rounding the product to float32 adds."""

_DTYPES = (*FLOATS.values(), torch.int8)
_SAYS_SO = re.compile(rf'"{TABLE}"\s*:\s*"'.encode())
_LEAST_SCALE = 2.0**-126  # float32's least normal number: below it a scale would be imprecise


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
            do not keep, or the indices of a parameter are not made of blocks or by the recorded
            seed, where that was asked for.
    """
    target = Path(path)
    check_kind(target)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(map(str, _DTYPES))}, not {dtype}")
    if indices is not None and indices not in CODINGS:
        raise ConfigError(
            f"indices are stored as one of {', '.join(CODINGS)}, not {indices!r}."
            f"{did_you_mean(str(indices), CODINGS)}"
        )
    records: dict[str, Record] = {}
    tensors: dict[str, Tensor] = {}
    for name, delta in adapter.items():
        fields, parts = _coded(name, delta.support, adapter.metadata, indices)
        scale = None
        if dtype == torch.int8:
            stored(name, delta.values, torch.float32)  # the dtype that they will be read in
            values, scale = quantize(delta.values.detach().cpu())
        else:
            values = stored(name, delta.values, dtype, _DTYPES)
        records[name] = Record(
            delta.support.shape, delta.nnz, WORDS[values.dtype], scale=scale, **fields
        )
        tensors[f"{name}.values"] = values
        for kind, units in parts.items():
            tensors[f"{name}.{kind}"] = torch.from_numpy(units)
    whole = {}
    for name, tensor in adapter.tensors.items():
        kept = tensors[f"{name}.{WHOLE}"] = stored(name, tensor)
        whole[name] = WORDS[kept.dtype], tuple(kept.shape)
    table = compose(Table(records, adapter.metadata, f"shira {__version__}", whole))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, *_file(table, tensors))


def _file(table: str, tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a file: header, then data, widest elements first so that all align."""
    data = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    checksum = zlib.crc32(table.encode())
    for raw in data.values():
        checksum = zlib.crc32(raw, checksum)
    header: dict[str, Any] = {"__metadata__": {TABLE: table, CHECKSUM: f"{checksum:08x}"}}
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    at = 0
    for name in order:
        end = at + len(data[name])
        header[name] = {
            "dtype": WORDS[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(data[name] for name in order)]


@dataclass(frozen=True)
class CompactFile:
    """A file in the compact format, read and checked.

    Attributes:
        path: The file.
        adapter: What it holds.
        records: How it holds each parameter.
        library: What wrote it: ``"shira 0.1.0"``.
    """

    path: Path
    adapter: Adapter
    records: Mapping[str, Record]
    library: str


def is_compact(path: Path) -> bool:
    """Return whether a path is, or as a folder has, a file that says it is in this format.

    A look at the bytes of its header, which `read_compact` checks.
    """
    path = _file_at(path)
    if not path.is_file():
        return False
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size  # more would be allocated before it is read
        return _SAYS_SO.search(file.read(min(length, size, HEADER_LIMIT))) is not None


def read_compact(path: str | os.PathLike[str], *, mapped: bool = False) -> CompactFile:
    """Read an adapter in the compact format.

    Args:
        path: The file, or a folder with an ``adapter.safetensors``.
        mapped: Leave the values in the file, mapped into memory, where they are stored in a
            floating dtype; writing to such a tensor makes a private copy of the page and does not
            reach the file. The file must not be shortened or written to in place meanwhile
            (replacing it, as `write_compact` does, is safe).

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If something in it is invalid; names file, parameter and cause.
    """
    where = _file_at(Path(path))
    with open_tensors(where) as file:
        table = _table(file)
        source = _Source(file, mapped)
        deltas = {name: _delta(source, name, record) for name, record in table.records.items()}
        whole = {name: source.values(f"{name}.{WHOLE}") for name in table.tensors}
        for name, tensor in whole.items():
            with refusing(where, f"whole tensor {name!r}"):
                check_whole(tensor)
    if f"{source.checksum:08x}" != file.metadata[CHECKSUM]:
        raise FileFormatError(
            f"{where}: damaged: its checksum is {source.checksum:08x}, but "
            f"{file.metadata[CHECKSUM][:40]!r} is recorded"
        )
    return CompactFile(where, Adapter(deltas, table.metadata, whole), table.records, table.library)


def _file_at(path: Path) -> Path:
    """Return the file that a path names; a folder in PEFT's format has none of this format."""
    folder = path.is_dir() and not (path / WEIGHTS_NAME).exists()
    return path / COMPACT_NAME if folder else path


def _table(file: TensorFile) -> Table:
    """Return the table, with every tensor that it needs there, of the right dtype and shape."""
    if missing := [key for key in (TABLE, CHECKSUM) if key not in file.metadata]:
        raise FileFormatError(
            f"{file.path}: not in the compact format: its __metadata__ has no {missing[0]!r}"
        )
    table = parse(file.metadata[TABLE], file.path, file.size)
    expected: dict[str, tuple[Collection[str], tuple[int, ...] | None]] = {}
    for name, record in table.records.items():
        expected[f"{name}.values"] = (record.values,), (record.k,)
        for kind in CODINGS[record.indices][1]:
            if kind != "rest" or f"{name}.rest" in file.tensors:
                expected[f"{name}.{kind}"] = gaps.UNITS, None
    for name, (dtype, shape) in table.tensors.items():
        expected[f"{name}.{WHOLE}"] = (dtype,), shape
    for key in {**expected, **file.tensors}:
        with refusing(file.path, f"tensor {key!r}"):
            if key not in expected:
                raise EntryError(f"the table does not name it.{did_you_mean(key, expected)}")
            if key not in file.tensors:
                hint = did_you_mean(key, file.tensors)
                raise FileFormatError(f"{file.path}: missing tensor {key!r}.{hint}")
            there, (dtypes, wanted) = file.tensors[key], expected[key]
            if there.dtype not in dtypes:
                told = " or ".join(dtypes)
                raise EntryError(f"dtype {there.dtype} is not {told}, as the table says")
            if len(there.shape) != 1 if wanted is None else there.shape != wanted:
                told = "(n,)" if wanted is None else f"{wanted}, as the table says"
                raise EntryError(f"shape {there.shape} is not {told}")
    return table


class _Source:
    """The tensors of an open file, and the checksum of what was taken from it."""

    def __init__(self, file: TensorFile, mapped: bool) -> None:
        self.path, self.file = file.path, file
        self._map = None
        if mapped and file.tensors and sys.byteorder == "little":
            self._map = mmap.mmap(file.file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.checksum = zlib.crc32(file.metadata[TABLE].encode())

    def values(self, name: str) -> Tensor:
        """Return a tensor that is kept: mapped if possible."""
        stored = self.file.tensors[name]
        count = math.prod(stored.shape)
        if self._map is None or stored.dtype == "I8" or not count or stored.start % 8:
            return tensor_of(self._bits(stored), stored).view(stored.shape)
        self.checksum = zlib.crc32(memoryview(self._map)[stored.start : stored.end], self.checksum)
        dtype = WHOLE_DTYPES[stored.dtype]
        kept = torch.frombuffer(self._map, dtype=dtype, count=count, offset=stored.start)
        return kept.view(stored.shape)

    def indices(self, name: str, numel: int, k: int | None = None) -> gaps.Ints:
        """Return the indices below ``numel``, ``k`` if it is given, that are kept as gaps."""
        stored = self.file.tensors[name]
        with refusing(self.path, f"tensor {name!r}"):
            return gaps.decode(self._bits(stored).view(gaps.UNITS[stored.dtype]), numel, k)

    def _bits(self, stored: Stored) -> Bits:
        bits = read_bits(self.file.file, stored)
        self.checksum = zlib.crc32(bits.data, self.checksum)
        return bits


def _delta(source: _Source, name: str, record: Record) -> SparseDelta:
    values = source.values(f"{name}.values")
    with refusing(source.path, f"tensor '{name}.values'"):
        if record.scale is None:
            check_values(values)
        elif bool((values == -128).any()):
            raise EntryError("-128 is no value: they are from -127 to 127")
    flat = torch.from_numpy(_indices(source, name, record))
    if record.scale is not None:
        values = dequantize(values, record.scale)
    return SparseDelta(Support._trusted(record.shape, flat), values)


# Indices: as gaps, as blocks, as a seed


def _coded(
    name: str, support: Support, metadata: Mapping[str, Any], way: str | None
) -> tuple[dict[str, Any], dict[str, gaps.Units]]:
    """Return fields of the record and the tensors that stand for the indices."""
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
    """Return the fields of a random mask, if the metadata's gives exactly this support."""
    seed, slot = metadata.get("random_seed"), metadata.get("mask_slot") or 0
    if metadata.get("mask_type") != "random" or type(seed) is not int or type(slot) is not int:
        return None
    try:
        made = random_support(support.shape, support.nnz, seed=seed, name=name, slot=slot)
    except MaskError:
        return None
    if not torch.equal(made.indices, support.indices.cpu()):
        return None
    return {"indices": "seed", "seed": seed, "slot": slot, "check": _crc_of(made.indices)}


def _crc_of(indices: Tensor) -> str:
    """Return the CRC-32 of indices as little-endian int32 or int64: eight hex digits."""
    return f"{zlib.crc32(bytes_of(indices.cpu())):08x}"


def _indices(source: _Source, name: str, record: Record) -> gaps.Ints:
    """Return the flat indices of a parameter, sorted, unique and in range."""
    numel = math.prod(record.shape)
    if record.indices == "gaps":
        return source.indices(f"{name}.gaps", numel, record.k)
    if record.block is not None:
        return _indices_of_blocks(source, name, record, record.block, numel)
    assert record.seed is not None
    assert record.slot is not None
    with refusing(source.path, f"tensor '{name}.values'"):
        made = random_support(
            record.shape, record.k, seed=record.seed, name=name, slot=record.slot
        ).indices
        if (found := _crc_of(made)) != record.check:
            raise EntryError(
                f"the seed gives indices of checksum {found}, but {record.check} is recorded: the "
                "file is damaged"
            )
    return made.numpy()


def _indices_of_blocks(
    source: _Source, name: str, record: Record, block: tuple[int, int], numel: int
) -> gaps.Ints:
    grid = math.prod(blocks.grid(block, record.shape))
    numbers = source.indices(f"{name}.blocks", grid).astype(np.int64)
    rest = np.empty(0, np.int64)
    if f"{name}.rest" in source.file.tensors:
        rest = source.indices(f"{name}.rest", numel).astype(np.int64)
    k = int(blocks.entries_of(block, numbers, record.shape).sum()) + len(rest)
    if k != record.k:
        raise FileFormatError(
            f"{source.path}: tensor '{name}.blocks': stands for {k} entries, but there are "
            f"{record.k} values"
        )
    flat = blocks.expand(blocks.Blocks(block, numbers, rest), record.shape)
    if len(rest) and bool((flat[1:] <= flat[:-1]).any()):
        raise FileFormatError(
            f"{source.path}: tensor '{name}.rest': an entry of the rest is in one of the blocks"
        )
    return flat


# Values: in their dtype, or in one byte each with one scale for each parameter


def quantize(values: Tensor) -> tuple[Tensor, float]:
    """Return values as int8 and their scale.

    ``scale = max |v| / 127`` in float32 and ``q = round(v / scale)``, half to even. Every value is
    within ``ERROR_BOUND * scale`` of what `dequantize` makes of it.

    Values are finite in float32 too; the steps are from -127 to 127; the scale is a number of
    float32, 0 for no values or zeros alone.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest:
        return torch.zeros_like(values, dtype=torch.int8), 0.0
    step = min(max(largest / 127, _LEAST_SCALE), LARGEST_SCALE)
    scale = float(np.float32(step))
    steps = values.to(torch.float64, copy=True)
    return steps.div_(scale).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize(steps: Tensor, scale: float) -> Tensor:
    """Return the values: float32 ``(k,)``, ``steps * scale``."""
    return steps.to(torch.float32).mul_(scale)
