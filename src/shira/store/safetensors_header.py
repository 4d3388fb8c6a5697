# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read and checked before a byte of its tensors is touched.

A safetensors file is eight bytes of little-endian header length, a JSON header that gives each
tensor a dtype, a shape and a range of bytes, and then those bytes, without gaps. A hostile header
may claim anything; here every claim is held against the size of the file, so that whoever reads a
tensor afterwards allocates no more than the file has. Reading a tensor goes through the same open
file, so it cannot be swapped in between.

The base of the readers in ``shira.store``; imports ``errors`` only.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from shira.errors import FileFormatError, did_you_mean
from shira.store.json_text import parse_object, shape_in

HEADER_LIMIT = 100_000_000
"""Largest header in bytes; the limit of the safetensors library itself."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_NUMPY = {
    "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "BF16": "<i2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        dtype: In safetensors' words: ``"F32"``, ``"I16"``.
        shape: Its shape.
        start: Its first byte, counted from the start of the file.
        end: The byte behind its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        path: The file.
        tensors: By name, in the header's order.
        metadata: The header's ``__metadata__``.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device would block or never end.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileFormatError(f"{os.fspath(path)}: not a regular file")
    return open(path, "rb")


def header_of(path: str | os.PathLike[str]) -> Header:
    """The checked header of the file at ``path``; see `read_header`."""
    with open_regular(path) as file:
        return read_header(file, path)


def read_header(file: BinaryIO, path: str | os.PathLike[str]) -> Header:
    """Read and check the header of an open safetensors file.

    Args:
        file: Open at its start.
        path: Its path, for messages.

    Raises:
        FileFormatError: If the file is truncated or another kind of file, or its header is too
            large, no JSON object, or describes tensors that it cannot hold: dtypes unknown, sizes
            negative or unlike dtype and shape, byte ranges outside the file, overlapping or with
            gaps.
    """
    path = Path(path)
    size = os.fstat(file.fileno()).st_size
    length = _header_length(file.read(9), size, path)
    file.seek(8)
    raw = file.read(length)
    if len(raw) < length:
        raise FileFormatError(f"{path}: truncated: it ends within its header")
    claims = parse_object(raw, path, "safetensors header", size)
    del raw
    metadata = claims.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError(f"{path}: the header's __metadata__ maps texts to texts")
    tensors = {name: _checked_info(path, name, claims[name], 8 + length) for name in claims}
    _check_ranges(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata)


def read_tensor(file: BinaryIO, header: Header, name: str) -> Tensor:
    """The named tensor, in its stored dtype, on the CPU, in memory of its own.

    Args:
        file: The open file that ``header`` was read from.
        header: Its checked header.
        name: One of ``header.tensors``, of an integer dtype or F16, BF16, F32, F64.

    Raises:
        FileFormatError: If its dtype is another, or the file has become shorter meanwhile.
    """
    info = header.tensors[name]
    if info.dtype not in _NUMPY:
        raise FileFormatError(
            f"{header.path}: tensor {name!r}: dtype {info.dtype} is none that can stand here"
        )
    raw = bytearray(info.end - info.start)
    file.seek(info.start)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise FileFormatError(f"{header.path}: tensor {name!r}: truncated while it was read")
    return tensor_from(raw, info)


def tensor_from(raw: bytearray, info: TensorInfo) -> Tensor:
    """The tensor that ``raw`` holds: its bytes in the file, as ``info`` describes them.

    Args:
        raw: Kept by the tensor.
        info: Of an integer dtype or F16, BF16, F32, F64.
    """
    array = np.frombuffer(raw, dtype=_NUMPY[info.dtype])
    array = array.astype(array.dtype.newbyteorder("="), copy=False).reshape(info.shape)
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if info.dtype == "BF16" else tensor


def _header_length(start: bytes, size: int, path: Path) -> int:
    """Length of the header from the file's first nine bytes."""
    length = int.from_bytes(start[:8], "little")
    # A pickle (0x80) or a zip of pickles (PK) may also read as a length, so look for the brace.
    if start[8:9] != b"{":
        if start[:1] == b"\x80" or start[:2] == b"PK":
            raise FileFormatError(
                f"{path}: a pickle (torch.save), not safetensors. Pickles can run code when they "
                "are read, so shira does not; convert it with safetensors.torch.save_file"
            )
        if start[:7] == b"version":
            raise FileFormatError(
                f"{path}: a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"
            )
    if size < 8:
        raise FileFormatError(
            f"{path}: truncated: {size} bytes are fewer than the 8 that start a safetensors file"
        )
    if length > HEADER_LIMIT:
        raise FileFormatError(
            f"{path}: not safetensors, or hostile: a header of {length} bytes is too large "
            f"(limit {HEADER_LIMIT})"
        )
    if length > size - 8:
        raise FileFormatError(
            f"{path}: truncated: its header should have {length} bytes, but only {size - 8} follow"
        )
    if start[8:9] != b"{":
        raise FileFormatError(f"{path}: not safetensors: the header does not start with '{{'")
    return length


def _checked_info(path: Path, name: str, claim: Any, data_start: int) -> TensorInfo:
    """One entry of the header; whether its byte range fits the file comes later."""

    def refuse(cause: str) -> FileFormatError:
        return FileFormatError(f"{path}: tensor {name!r}: {cause}")

    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise refuse("the header gives dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise refuse(f"unknown dtype {str(dtype)[:40]!r}.{did_you_mean(str(dtype).upper(), _BITS)}")
    try:
        shape = shape_in(shape)
    except ValueError as error:
        raise refuse(str(error)) from error
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_int(n) for n in offsets):
        raise refuse("data_offsets are two integers")
    start, end = offsets
    if not 0 <= start <= end:
        raise refuse(f"data_offsets {start} to {end} are no range of bytes")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (end - start):
        raise refuse(
            f"shape {list(shape)} of {dtype} takes {-(-bits // 8)} bytes, "
            f"but data_offsets give it a size of {end - start}"
        )
    return TensorInfo(dtype, shape, data_start + start, data_start + end)


def _check_ranges(path: Path, tensors: Mapping[str, TensorInfo], at: int, size: int) -> None:
    """The tensors' bytes follow one another from ``at`` to the end of the file."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            what = "overlap those of another tensor" if info.start < at else "leave a gap"
            raise FileFormatError(
                f"{path}: tensor {name!r}: its bytes, {info.start} to {info.end}, {what} "
                f"(expected to start at {at})"
            )
        if info.end > size:
            raise FileFormatError(
                f"{path}: tensor {name!r}: truncated: it ends at byte {info.end} of a file of "
                f"{size} bytes"
            )
        at = info.end
    if at != size:
        raise FileFormatError(f"{path}: {size - at} bytes follow the last tensor")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
