# SPDX-License-Identifier: Apache-2.0
"""Reading the compact format, which ``compact_write`` writes and ``docs/file-format.md`` specifies.

Nothing is believed: names, dtypes and sizes of all tensors are held against the table before the
first is read, counts are compared before room is made for what they count, and at the end a
checksum covers the table and all data. What is made on the way is in proportion to the file.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from shira import blocks
from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import FileFormatError, MaskError, SupportError, did_you_mean
from shira.masks.random import random_support
from shira.ops import gaps
from shira.store import int8
from shira.store.compact_table import CHECKSUM, CODINGS, TABLE, WHOLE, Record, Table, parse
from shira.store.compact_write import crc_of
from shira.store.entries import WHOLE_DTYPES, EntryError, check_values, check_whole
from shira.store.peft_format import WEIGHTS_NAME
from shira.store.safetensors_header import (
    Header,
    TensorInfo,
    open_regular,
    read_header,
    tensor_from,
)
from shira.support import Support


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


COMPACT_NAME = "adapter.safetensors"
"""The compact file in a folder that is given in its place."""


def is_compact(path: Path) -> bool:
    """Whether a path is, or as a folder has, a file that says it is in the compact format."""
    path = _file_at(path)
    if not path.is_file():
        return False
    with open_regular(path) as file:
        try:
            return TABLE in read_header(file, path).metadata
        except FileFormatError:
            return False


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
    with open_regular(where) as file:
        header = read_header(file, where)
        table = _table(header, os.fstat(file.fileno()).st_size)
        source = _Source(file, header, mapped)
        deltas = {}
        for name, record in table.records.items():
            try:
                deltas[name] = _entries(source, name, record)
            except EntryError as error:
                raise FileFormatError(
                    f"{where}: tensor '{name}.{error.tensor}': {error}"
                ) from error
        whole = {name: source.values(f"{name}.{WHOLE}") for name in table.tensors}
        for name, tensor in whole.items():
            try:
                check_whole(name, tensor)
            except EntryError as error:
                raise FileFormatError(f"{where}: whole tensor {name!r}: {error}") from error
    if f"{source.checksum:08x}" != header.metadata[CHECKSUM]:
        raise FileFormatError(
            f"{where}: damaged: its checksum is {source.checksum:08x}, but "
            f"{header.metadata[CHECKSUM][:40]!r} is recorded"
        )
    adapter = Adapter(
        {
            name: SparseDelta(support, _floating(values, table.records[name].scale))
            for name, (support, values) in deltas.items()
        },
        table.metadata,
        whole,
    )
    return CompactFile(where, adapter, table.records, table.library)


def _file_at(path: Path) -> Path:
    """The file that a path means; a folder in PEFT's format has none that is meant."""
    folder = path.is_dir() and not (path / WEIGHTS_NAME).exists()
    return path / COMPACT_NAME if folder else path


class _Source:
    """The tensors of an open file, and the checksum of what was taken from it."""

    def __init__(self, file: BinaryIO, header: Header, mapped: bool) -> None:
        self._file, self._header = file, header
        self._map = None
        if mapped and header.tensors and sys.byteorder == "little":
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.checksum = zlib.crc32(header.metadata[TABLE].encode("utf-8", "surrogatepass"))

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def values(self, name: str) -> Tensor:
        """A tensor that is kept: mapped if possible."""
        info = self._header.tensors[name]
        count = math.prod(info.shape)
        if self._map is None or info.dtype == "I8" or not count or info.start % 8:
            return tensor_from(self._raw(name), info)
        raw = memoryview(self._map)[info.start : info.end]
        self.checksum = zlib.crc32(raw, self.checksum)
        dtype = WHOLE_DTYPES[info.dtype]
        kept = torch.frombuffer(self._map, dtype=dtype, count=count, offset=info.start)
        return kept.view(info.shape)

    def units(self, name: str) -> gaps.Units:
        """A tensor that is decoded."""
        dtype = gaps.UNITS[self._header.tensors[name].dtype]
        units: gaps.Units = np.frombuffer(self._raw(name), dtype)
        return units

    def _raw(self, name: str) -> bytearray:
        info = self._header.tensors[name]
        raw = bytearray(info.end - info.start)
        self._file.seek(info.start)
        if self._file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise FileFormatError(f"{self._header.path}: truncated while it was read")
        self.checksum = zlib.crc32(raw, self.checksum)
        return raw


def _table(header: Header, size: int) -> Table:
    """The table, with every tensor that it needs there, of the right dtype and shape."""
    for key in (TABLE, CHECKSUM):
        if key not in header.metadata:
            raise FileFormatError(
                f"{header.path}: not in the compact format: its __metadata__ has no {key!r}"
            )
    table = parse(header.metadata[TABLE], header.path, size)
    known = set()
    for name, record in table.records.items():
        known.add(key := f"{name}.values")
        _check(header, key, (record.values,), (record.k,))
        for kind in CODINGS[record.indices]:
            key = f"{name}.{kind}"
            if kind != "rest" or key in header.tensors:
                known.add(key)
                _check(header, key, tuple(gaps.UNITS), None)
    for name, (dtype, shape) in table.tensors.items():
        known.add(key := f"{name}.{WHOLE}")
        _check(header, key, (dtype,), shape)
    for key in header.tensors:
        if key not in known:
            raise FileFormatError(
                f"{header.path}: tensor {key!r}: the table does not name it."
                f"{did_you_mean(key, known)}"
            )
    return table


def _check(
    header: Header, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None
) -> None:
    """Check that a tensor is there, of one of the dtypes and of the shape (None: any in 1-D)."""
    info: TensorInfo | None = header.tensors.get(name)
    if info is None:
        raise FileFormatError(
            f"{header.path}: missing tensor {name!r}.{did_you_mean(name, header.tensors)}"
        )
    if info.dtype not in dtypes:
        raise FileFormatError(
            f"{header.path}: tensor {name!r}: dtype {info.dtype} is not {' or '.join(dtypes)}, "
            "as the table says"
        )
    if info.shape != shape and (shape is not None or len(info.shape) != 1):
        wanted = "(n,)" if shape is None else f"{shape}, as the table says"
        raise FileFormatError(f"{header.path}: tensor {name!r}: shape {info.shape} is not {wanted}")


def _entries(source: _Source, name: str, record: Record) -> tuple[Support, Tensor]:
    values = source.values(f"{name}.values")
    with _blaming("values"):
        if values.dtype != torch.int8:
            check_values(values)
        elif bool((values == -128).any()):
            raise EntryError("values", "-128 is no value: they are from -127 to 127")
    return _SUPPORTS[record.indices](source, name, record), values


@contextmanager
def _blaming(tensor: str) -> Iterator[None]:
    """Errors of entries inside are of this tensor."""
    try:
        yield
    except (EntryError, SupportError) as error:
        raise EntryError(tensor, str(error)) from error


def _of_gaps(source: _Source, name: str, record: Record) -> Support:
    units = source.units(f"{name}.gaps")
    with _blaming("gaps"):
        return _trusted(record, gaps.decode(units, record.numel, record.k))


def _of_blocks(source: _Source, name: str, record: Record) -> Support:
    assert record.block is not None
    down, across = blocks.grid(record.block, record.shape)
    with _blaming("blocks"):
        numbers = gaps.decode(source.units(f"{name}.blocks"), down * across).astype(np.int64)
    inside = int(blocks.entries_of(record.block, numbers, record.shape).sum())
    rest = np.empty(0, np.int64)
    with _blaming("rest"):
        if f"{name}.rest" in source:
            units = source.units(f"{name}.rest")
            inside += gaps.count_of(units)
            rest = gaps.decode(units, record.numel)
    if inside != record.k:
        raise EntryError("blocks", f"stands for {inside} entries, but there are {record.k} values")
    flat = blocks.expand(blocks.Blocks(record.block, numbers, rest), record.shape)
    if len(rest) and bool((flat[1:] <= flat[:-1]).any()):
        raise EntryError("rest", "an entry of the rest is in one of the blocks")
    return _trusted(record, flat)


def _of_seed(source: _Source, name: str, record: Record) -> Support:
    assert record.seed is not None
    assert record.slot is not None
    try:
        support = random_support(
            record.shape, record.k, seed=record.seed, name=name, slot=record.slot
        )
    except MaskError as error:
        raise EntryError("values", str(error)) from error
    if (found := crc_of(support.indices)) != record.check:
        raise EntryError(
            "values",
            f"the seed gives indices of checksum {found}, but {record.check} is recorded: the file "
            "is damaged",
        )
    return support


_SUPPORTS = {"gaps": _of_gaps, "blocks": _of_blocks, "seed": _of_seed}


def _trusted(record: Record, indices: gaps.Ints) -> Support:
    return Support._trusted(record.shape, torch.from_numpy(indices))


def _floating(values: Tensor, scale: float | None) -> Tensor:
    return values if scale is None else int8.dequantize(values, scale)
