# SPDX-License-Identifier: Apache-2.0
"""Safetensors files that one does not trust: the header first, then tensors, then their values.

A safetensors file is eight bytes of little-endian header length, a JSON header that gives each
tensor a dtype, a shape and a range of bytes, and then those bytes, without gaps. A hostile header
may claim anything; here every claim is held against the size of the file, so that whoever reads a
tensor afterwards allocates no more than the file has. Reading a tensor goes through the same open
file, so it cannot be swapped in between.

The base of the readers in ``shira.store`` and of ``shira.checkpoints``; imports ``errors`` only.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.errors import AdapterError, FileFormatError, did_you_mean
from shira.store.json_text import open_regular, parse_object, shape_in

HEADER_LIMIT = 100_000_000
"""Largest header in bytes; the limit of the safetensors library itself."""

COORDINATE_LIMIT = 2**31
"""Rows and columns are below this: PEFT keeps them as int32."""

_EXACT_FLOAT32 = 2**24  # whole numbers below it are float32's

FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes that a delta can have, or be added to, in safetensors' words."""

WHOLE_DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Dtypes of whole tensors; the integers are those of buffers."""

Bits = NDArray[np.signedinteger[Any]]
_READABLE = {**WHOLE_DTYPES, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
_UNITS = {name: np.dtype(f"<i{dtype.itemsize}") for name, dtype in _READABLE.items()}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
WORDS: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _READABLE.items()}
"""Safetensors' words for the dtypes that are read and written."""

_BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in _READABLE.items()},
    **{"BOOL": 8, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8},
    **{"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


class Stored(NamedTuple):
    """One tensor of a file."""

    key: str  # its name in the file
    file: Path
    dtype: str  # in safetensors' words: "F32", "I16"
    shape: tuple[int, ...]
    start: int  # its first byte, counted from the start of the file
    end: int  # the byte behind its last


@dataclass(frozen=True)
class TensorFile:
    """An open file whose header is checked: its size in bytes, tensors by name, metadata."""

    path: Path
    file: BinaryIO
    size: int
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """Return a tensor, in its stored dtype, on the CPU, in memory of its own.

        Raises:
            FileFormatError: If it is neither of integers nor F16, BF16, F32 or F64, or the file has
                become shorter meanwhile.
        """
        stored = self.tensors[name]
        if stored.dtype not in _READABLE:
            raise FileFormatError(
                f"{self.path}: tensor {name!r}: dtype {stored.dtype} is none that can stand here"
            )
        return tensor_of(read_bits(self.file, stored), stored).view(stored.shape)


def parse_header(
    raw: bytes, path: Path, size: int | None = None
) -> tuple[dict[str, Stored], Mapping[str, str]]:
    """Return the tensors and the metadata of a header, the JSON alone.

    ``size`` is that of the whole file; None: what the header says.

    Raises:
        FileFormatError: If it is no JSON object, or describes tensors that the file cannot hold.
    """
    claims = parse_object(raw, path, "safetensors header", size)
    metadata = claims.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError(f"{path}: the header's __metadata__ maps texts to texts")
    tensors = {}
    for name, claim in claims.items():
        with refusing(path, f"tensor {name!r}"):
            tensors[name] = _checked(claim, name, path, 8 + len(raw))
    if size is None:
        size = max((stored.end for stored in tensors.values()), default=8 + len(raw))
    _check_ranges(path, tensors, 8 + len(raw), size)
    return tensors, metadata


class EntryError(ValueError):
    """Entries that no adapter can have; whoever reads a file says where in it they are."""


class refusing:  # used as a function; a generator would cost three times as much
    """Turn errors of entries, shapes and positions into one of a file, and of ``what`` in it."""

    __slots__ = ("_path", "_what")

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # EntryError, SupportError and MaskError are ValueErrors, and so is FileFormatError.
        if isinstance(error, ValueError) and not isinstance(error, FileFormatError):
            raise FileFormatError(f"{os.fspath(self._path)}: {self._what}: {error}") from error


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Open a safetensors file, after its header was checked.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If the file is truncated or another kind of file, or its header is too
            large, no JSON object, or describes tensors that it cannot hold: dtypes unknown, sizes
            negative or unlike dtype and shape, byte ranges outside the file, overlapping or with
            gaps.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(9), size, path)
        file.seek(8)
        raw = file.read(length)
        if len(raw) < length:
            raise FileFormatError(f"{path}: truncated: it ends within its header")
        tensors, metadata = parse_header(raw, path, size)
        yield TensorFile(path, file, size, tensors, metadata)


def read_bits(file: BinaryIO, stored: Stored, first: int = 0, count: int | None = None) -> Bits:
    """Read a stored tensor, or ``count`` entries of it, as integers of their width: 1-D."""
    unit = _UNITS[stored.dtype]
    size = stored.end - stored.start if count is None else count * unit.itemsize
    return read_bytes(file, stored, first * unit.itemsize, size).view(unit)


def read_bytes(file: BinaryIO, stored: Stored, first: int, size: int) -> NDArray[np.uint8]:
    """Read so many bytes of a stored tensor, of any dtype, from its byte ``first`` on."""
    raw = np.empty(size, np.uint8)
    file.seek(stored.start + first)
    rest = raw.data
    while rest:
        got = file.readinto(rest)  # type: ignore[attr-defined]
        if not got:
            raise FileFormatError(f"{stored.file}: tensor {stored.key!r}: truncated while read")
        rest = rest[got:]
    return raw


def tensor_of(bits: Bits, stored: Stored) -> Tensor:
    """Return the entries of a stored tensor that these bits are: 1-D, in the same memory."""
    if sys.byteorder == "big":
        bits = bits.astype(bits.dtype.newbyteorder("="))
    return torch.from_numpy(bits).view(_READABLE[stored.dtype])


def width_of(dtype: str) -> int:
    """Return the bytes of an entry of a dtype in safetensors' words; 1 of one below a byte."""
    return max(_BITS[dtype] // 8, 1)


def bits_of(values: Tensor) -> Tensor:
    """Return the values as integers of their width, which tell 0.0 from -0.0."""
    return values.view(_INTEGERS[values.itemsize])


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU as a file has them."""
    bits = bits_of(tensor.reshape(-1)).numpy()
    if sys.byteorder == "big":
        bits = bits.byteswap()
    return bits.view(np.uint8).data


def check_values(values: Tensor) -> None:
    """Raise an `EntryError` if there are NaN or infinite values."""
    if not values.numel():
        return
    least, largest = values.aminmax()  # either is NaN if there is one
    if not (math.isfinite(least.item()) and math.isfinite(largest.item())):
        nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
        raise EntryError(
            f"the values are not finite: {nan} NaN and {infinite} infinite of {values.numel()}"
        )


def check_whole(tensor: Tensor) -> None:
    """Raise an `EntryError` if a dtype is not one of `WHOLE_DTYPES`, or a value is not finite."""
    if tensor.dtype not in WHOLE_DTYPES.values():
        raise EntryError(f"a whole tensor of {tensor.dtype} cannot be stored")
    if tensor.is_floating_point():
        check_values(tensor)


def in_order(coordinates: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of entries, checked and in row-major order, and the values with them.

    Coordinates ``(2, k)`` are of an integer dtype, or float32 with whole numbers, which PEFT writes
    on Windows; they become int32.

    Raises:
        EntryError: If a coordinate is not whole, negative, beyond int32, or there twice.
    """
    if coordinates.is_floating_point():
        inexact = (coordinates != coordinates.trunc()) | ~(coordinates.abs() < _EXACT_FLOAT32)
        if bool(inexact.any()):
            bad = coordinates[inexact][0].item()
            raise EntryError(f"index {bad} is no whole number below 2^24")
    row, column = wide = coordinates.to(torch.int64)
    for index in map(int, wide.aminmax() if wide.numel() else ()):
        if not 0 <= index < COORDINATE_LIMIT:
            if coordinates.dtype == torch.uint64:  # the largest wrap
                index %= 2**64
            raise EntryError(f"index {index} {'is negative' if index < 0 else 'overflows int32'}")
    key = row * COORDINATE_LIMIT + column
    if bool((key[1:] > key[:-1]).all()):
        return coordinates.to(torch.int32), values
    key, order = key.sort()
    twice = key[1:] == key[:-1]
    if bool(twice.any()):
        first = int(key[1:][twice][0])
        raise EntryError(
            f"duplicate indices: row {first // COORDINATE_LIMIT}, column "
            f"{first % COORDINATE_LIMIT} occurs more than once "
            f"({int(twice.sum())} of {key.numel()} entries are repeats)"
        )
    return coordinates.to(torch.int32)[:, order], values[order]


def stored(
    name: str, tensor: Tensor, dtype: torch.dtype | None = None, choices: Sequence[torch.dtype] = ()
) -> Tensor:
    """Return a tensor as a file is to hold it: checked, contiguous and on the CPU.

    ``dtype`` None keeps its own; ``choices`` are the dtypes that values can be stored in.

    Raises:
        AdapterError: If the dtype cannot be stored, a value is not finite in it, or there are no
            values: on the meta device.
    """
    if tensor.is_meta:
        raise AdapterError(
            f"{name!r} is on the meta device and has no values to save; load the model first"
        )
    if choices and dtype is None and tensor.dtype not in choices:
        raise AdapterError(
            f"values of {name!r} are {tensor.dtype}; give dtype= to store them in one of "
            f"{', '.join(map(str, choices))}"
        )
    kept = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    try:
        check_whole(kept)
    except EntryError as error:
        hint = "" if dtype is None else f" when stored as {dtype}"
        raise AdapterError(f"{name!r}: {error}{hint}") from error
    return kept


def _header_length(start: bytes, size: int, path: Path) -> int:
    """Return the length of the header from the file's first nine bytes."""
    length, brace = int.from_bytes(start[:8], "little"), start[8:9] == b"{"
    cause = ""
    # A pickle (0x80) or a zip of pickles (PK) may also read as a length, so look for the brace.
    if not brace and (start[:1] == b"\x80" or start[:2] == b"PK"):
        cause = (
            "a pickle (torch.save), not safetensors. Pickles can run code when they are read, so "
            "shira does not; convert it with safetensors.torch.save_file"
        )
    elif not brace and start[:7] == b"version":
        cause = "a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'"
    elif size < 8:
        cause = f"truncated: {size} bytes are fewer than the 8 that start a safetensors file"
    elif length > HEADER_LIMIT:
        cause = (
            f"not safetensors, or hostile: a header of {length} bytes is too large (limit "
            f"{HEADER_LIMIT})"
        )
    elif length > size - 8:
        cause = f"truncated: its header should have {length} bytes, but only {size - 8} follow"
    elif not brace:
        cause = "not safetensors: the header does not start with '{'"
    if cause:
        raise FileFormatError(f"{path}: {cause}")
    return length


def _checked(claim: Any, key: str, path: Path, data_start: int) -> Stored:
    """Return one entry of the header; whether its byte range fits the file comes later."""
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise EntryError("the header gives dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = claim["dtype"], shape_in(claim["shape"]), claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        hint = did_you_mean(str(dtype).upper(), _BITS)
        raise EntryError(f"unknown dtype {str(dtype)[:40]!r}.{hint}")
    if not isinstance(offsets, list) or [type(at) for at in offsets] != [int, int]:
        raise EntryError("data_offsets are two integers")
    start, end = offsets
    if not 0 <= start <= end:
        raise EntryError(f"data_offsets {start} to {end} are no range of bytes")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (end - start):
        raise EntryError(
            f"shape {list(shape)} of {dtype} takes {-(-bits // 8)} bytes, "
            f"but data_offsets give it a size of {end - start}"
        )
    return Stored(key, path, dtype, shape, data_start + start, data_start + end)


def _check_ranges(path: Path, tensors: Mapping[str, Stored], at: int, size: int) -> None:
    """Check that the tensors' bytes follow one another from ``at`` to the end of the file."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        cause = ""
        if info.end > size:
            cause = f"truncated: it ends at byte {info.end} of a file of {size} bytes"
        if info.start != at:
            what = "overlap those of another tensor" if info.start < at else "leave a gap"
            cause = f"its bytes, {info.start} to {info.end}, {what} (expected to start at {at})"
        if cause:
            raise FileFormatError(f"{path}: tensor {name!r}: {cause}")
        at = info.end
    if at != size:
        raise FileFormatError(f"{path}: {size - at} bytes follow the last tensor")
