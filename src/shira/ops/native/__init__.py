# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels, on CPU tensors: `load` gives them, or nothing and the reason.

Plain C beside this file, compiled when shira is installed (`build`), called through ctypes on the
memory of tensors. It links neither torch nor Python, and takes its threads from the OpenMP pool
that torch has loaded already. Whatever is here, ``shira.ops`` can also do through torch alone, but
for `Kernels.touch`: the least that `Kernels.swap` could do, to compare.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from array import array
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira.blocks import BlockLayout

# Not imported from `build`: that is also a program, which should not be loaded before it runs.
LIBRARY = Path(__file__).with_name("_native.so")

VERSION = 12  # of the signatures below; see shira_native_version in cpu.c
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of operands and weights; deltas and gradients are float32."""

_SETS = ("base", "avx2", "avx512")  # by the number that shira_instruction_set gives
_UNITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
_SHORT = 8192  # entries below which one thread is faster than waking others
_WIDEST, _WIDER = 64, 15  # of deltas.c: tokens at a time, and how many may be added to a group's
_ROOM = 2**22  # floats of transposed input at a time
_KEPT = 2**19  # floats of scratch that a thread keeps
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "deltas_scratch": (_L, [_L, _I]),
    "deltas": (_L, [_P, _L, _P, _L, _I, _L, _P, _P, _I, _P, _L, _L, _L, _I, _P, _L, _I]),
    "entries_scratch": (_L, [_L, _L, _L, _I]),
    "entries": (None, [_P, _L, _P, _L, _L, _L, _L, _P, _P, _P, _P, _I, _I]),
    "tiles_scratch": (_L, [_L, _I, _I]),
    "tiles": (None, [_P, _L, _P, _L, _L, _L, _L, _P, _P, _P, _P, _L, _I, _P, _P, _I, _I]),
    "enter": (None, [_P, _P, _I, _L, _P, _P, _P, _P, _I, _I]),
    "leave": (None, [_P, _P, _I, _L, _P, _P, _P, _I, _I]),
    "coordinates": (None, [_P, _I, _L, _P, _L, _L, _P, _P, _P, _I]),
    "count_gaps": (None, [_P, _I, _L, _P]),
    "encode_gaps": (None, [_P, _I, _L, _P, _I]),
    "decode_gaps": (_I, [_P, _I, _L, _L, _P, _I, _L]),
    "swap": (_L, [_P, _I, _I, _P, _P, _P, _L, _P, _P, _P, _L, _I, _P, _I]),
    "permute": (None, [_L, _L, _L, _L, _L, _P, _I, _P, _I, _I]),
    "ascending": (None, [_P, _L, _P, _L]),
    "touch": (ctypes.c_uint64, [_P, _P, _L, _P, _L, _I]),
}


class Gaps(NamedTuple):
    """Entries of a weight in one piece of memory by the gaps between them; see `shira.ops.gaps`."""

    units: Tensor
    """uint8 or uint16 ``(n,)``, contiguous."""
    marks: Tensor
    """int64 ``(blocks + 1, 2)``, contiguous: `shira.ops.gaps.marks`."""
    nnz: int
    """The number of entries, k."""


class Columns(NamedTuple):
    """Entries of a matrix of at most 2^16 columns by where each row begins and by their columns."""

    crow: Tensor
    """int32 ``(rows + 1,)``, contiguous."""
    col: Tensor
    """uint16 ``(k,)``, contiguous."""


class Places:
    """The entries of several weights, as `Kernels.add_products` takes them.

    By their gaps, or, where ``columns`` has them, by their columns: for groups of a single row, of
    matrices that are not transposed.
    """

    __slots__ = "_owners", "entries", "gaps", "sizes", "table"

    def __init__(
        self, gaps: Sequence[Gaps], columns: Mapping[int, Columns] = MappingProxyType({})
    ) -> None:
        self.gaps, self._owners = gaps, columns  # of the memory that the table leads to
        self.sizes = [nnz for _, _, nnz in gaps]
        self.entries = sum(self.sizes)
        self.table = array("q")
        for i, (units, marks, nnz) in enumerate(gaps):
            memory = units.data_ptr(), units.itemsize, units.numel(), marks.data_ptr()
            if i in columns:
                crow, col = columns[i]
                memory = col.data_ptr(), 0, nnz, crow.data_ptr()
            self.table.extend((*memory, nnz))


class Batch:
    """Groups of rows, each with its entries and their values, as `Kernels.add_products` takes them.

    Values are ``(k,)`` each, in a dtype of `KINDS`, contiguous; counts are numbers of rows.
    """

    __slots__ = "places", "shares", "size", "width"

    def __init__(self, places: Places, values: Sequence[Tensor], counts: Sequence[int]) -> None:
        kinds = [KINDS[value.dtype] for value in values]
        self.places, self.size = places, len(kinds)
        self.shares = array("q", [*map(Tensor.data_ptr, values), *kinds, *counts])
        self.width = sum([1 if count == 1 else count + _WIDER for count in counts])


class Loaded(NamedTuple):
    """The library, or why there is none."""

    library: Kernels | None
    why: str


class Kernels:
    """The functions of the library, for the best instruction set that this CPU has.

    Tensors are on the CPU. Callers see to shapes, dtypes and bounds; nothing is checked here. What
    C writes to is made of an operand (``new_empty``) and a dtype, whatever torch's defaults are.
    """

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._call: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function: Any = library[f"shira_{name}_{instruction_set}"]
            function.restype, function.argtypes = result, arguments
            self._call[name] = function
        self._enter, self._leave = self._call["enter"], self._call["leave"]
        self._entries_scratch = lru_cache(1024)(self._call["entries_scratch"])
        self._tiles_scratch = lru_cache(1024)(self._call["tiles_scratch"])
        self._deltas_scratch = lru_cache(1024)(self._call["deltas_scratch"])
        self._kept = threading.local()

    def entries(self, left: Tensor, right: Tensor, crow: Tensor, col: Tensor) -> Tensor:
        """Compute ``(left^T right)`` at a compressed row pattern's entries: float32 ``(k,)``.

        Of ``(tokens, rows)`` and ``(tokens, cols)`` in a dtype of `KINDS`; crow ``(rows + 1,)`` and
        col ``(k,)``, sorted within each row, are int32 and contiguous.
        """
        left, right = _rows_contiguous(left), _rows_contiguous(right)
        threads, k = torch.get_num_threads(), col.numel()
        (tokens, rows), cols = left.shape, right.shape[1]
        out = left.new_empty(k, dtype=torch.float32)
        size = self._entries_scratch(tokens, cols, k, threads)
        scratch = left.new_empty(size, dtype=torch.uint8)
        self._call["entries"](
            left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), tokens, rows, cols,
            crow.data_ptr(), col.data_ptr(), out.data_ptr(), scratch.data_ptr(),
            KINDS[left.dtype], threads,
        )  # fmt: skip
        return out

    def tiles(
        self, left: Tensor, right: Tensor, crow: Tensor, col: Tensor, tiles: BlockLayout
    ) -> Tensor:
        """Compute as `entries` does, for entries that all lie in these blocks."""
        left, right = _rows_contiguous(left), _rows_contiguous(right)
        threads = torch.get_num_threads()
        (tokens, rows), cols = left.shape, right.shape[1]
        size, count = tiles.block_size, len(tiles)
        out = left.new_empty(col.numel(), dtype=torch.float32)
        scratch = left.new_empty(self._tiles_scratch(count, size, threads), dtype=torch.uint8)
        self._call["tiles"](
            left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), tokens, rows, cols,
            crow.data_ptr(), col.data_ptr(), tiles.row_block.data_ptr(), tiles.col_block.data_ptr(),
            count, size, out.data_ptr(), scratch.data_ptr(), KINDS[left.dtype], threads,
        )  # fmt: skip
        return out

    def add_products(
        self, y: Tensor, x: Tensor, rows: Tensor, batch: Batch, shape: tuple[int, int],
        transposed: bool,
    ) -> int:  # fmt: skip
        """Add ``x dW^T`` to rows of y in place, rounded once, each group of rows with its own dW.

        ``(tokens, out)`` and ``(tokens, in)`` in one dtype of `KINDS`, contiguous ones of any
        number of dimensions; rows int64, contiguous, those of one group of the batch after the
        other; dW is ``(out, in)``, or ``(in, out)`` if transposed.

        Returns -1; or which of the rows is out of range or named before, and nothing was done.
        """
        places, (ins, out) = batch.places, shape if transposed else shape[::-1]
        if not x.is_contiguous():
            x = _rows_contiguous(x)
        threads, tokens = _threads(places.entries), math.prod(y.shape[:-1])
        room = (ins + 1) * max(_WIDEST, min(batch.width, _ROOM // (ins + 1))) + tokens // 32
        size = room + threads * self._deltas_scratch(out, transposed)
        scratch = self._scratch_of(size)
        return self._call["deltas"](  # type: ignore[no-any-return]
            x.data_ptr(), ins if x.is_contiguous() else x.stride(0),
            y.data_ptr(), out if y.is_contiguous() else y.stride(0), KINDS[x.dtype], tokens,
            places.table.buffer_info()[0], batch.shares.buffer_info()[0], batch.size,
            rows.data_ptr(), len(rows), *shape, transposed, scratch.data_ptr(), room, threads,
        )  # fmt: skip

    def _scratch_of(self, size: int) -> Tensor:
        """Return so many floats, kept for the thread's next call where they are few."""
        kept: Tensor | None = getattr(self._kept, "scratch", None)
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=torch.float32, device="cpu")
            if size <= _KEPT:
                self._kept.scratch = kept
        return kept

    def coordinates(
        self, gaps: Gaps, shape: tuple[int, int], rows: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return ``crow, row, col`` of the entries in a matrix of at least one column, int32.

        The row of each is None if they are not wanted.
        """
        k, units = gaps.nnz, gaps.units
        crow = units.new_empty(shape[0] + 1, dtype=torch.int32)
        col = units.new_empty(k, dtype=torch.int32)
        row = torch.empty_like(col) if rows else None
        self._call["coordinates"](
            units.data_ptr(), units.itemsize, units.numel(), gaps.marks.data_ptr(), *shape,
            crow.data_ptr(), row.data_ptr() if row is not None else None, col.data_ptr(),
            1 if k < _SHORT else torch.get_num_threads(),
        )  # fmt: skip
        return crow, row, col

    def columns(self, gaps: Gaps, shape: tuple[int, int]) -> Columns:
        """Return the entries of a matrix of at most 2^16 columns by their columns."""
        crow, _, col = self.coordinates(gaps, shape, False)
        return Columns(crow, col.to(torch.uint16))

    def encode_gaps(self, indices: Tensor, widest: int) -> Tensor:
        """Return the gaps of contiguous indices, as ``shira.ops.gaps.encode`` says.

        In the unit of 1, 2 or 4 bytes, ``widest`` at most, that takes the fewest bytes.
        """
        address, size, k = indices.data_ptr(), indices.itemsize, indices.numel()
        counts = (_L * 3)()
        self._call["count_gaps"](address, size, k, counts)
        width, count = min(
            ((unit, counts[i]) for i, unit in enumerate((1, 2, 4)) if unit <= widest),
            key=lambda pair: pair[0] * pair[1],
        )
        units = indices.new_empty(count, dtype=_UNITS[width])
        self._call["encode_gaps"](address, size, k, units.data_ptr(), width)
        return units

    def decode_gaps(self, units: Tensor, numel: int, indices: Tensor) -> bool:
        """Write the indices whose gaps these units of 1 or 2 bytes are; all contiguous.

        False if they are not those of as many indices below ``numel`` as there is room for.
        """
        return bool(
            self._call["decode_gaps"](
                units.data_ptr(), units.itemsize, units.numel(), numel,
                indices.data_ptr(), indices.itemsize, indices.numel(),
            )
        )  # fmt: skip

    def swap(
        self, memory: Tensor, before: tuple[Tensor, ...] | None, after: tuple[Tensor, ...] | None,
        check: bool, done: ctypes.c_int,
    ) -> int:  # fmt: skip
        """Take one patch out of a memory of items of 2, 4 or 8 bytes and put another in.

        Both as ``offsets, originals, replacement`` of a `shira.ops.patch.Patch`; None is the base.
        ``done`` is set to whether all is written. With ``check`` entries are compared first, and
        the offset of one that does not hold what it should is returned, nothing being changed; -1
        if there is none.
        """
        offsets = [patch[0] for patch in (before, after) if patch]
        entries = sum(map(Tensor.numel, offsets))
        if not entries:
            return -1  # and nothing to be undone
        return self._call["swap"](  # type: ignore[no-any-return]
            memory.data_ptr(), memory.itemsize, offsets[0].itemsize, *_patch(before),
            *_patch(after), check, ctypes.byref(done), _threads(entries),
        )  # fmt: skip

    def touch(self, memory: Tensor, lines: Tensor, stream: Tensor) -> None:
        """Read and write one word of each of some 64-byte lines, int32, and read a stream."""
        self._call["touch"](
            memory.data_ptr(), lines.data_ptr(), lines.numel(), stream.data_ptr(), stream.numel(),
            torch.get_num_threads(),
        )  # fmt: skip

    def permute(
        self, start: int, count: int, numel: int, grid: tuple[int, int], keys: Tensor
    ) -> Tensor:
        """Return images as ``shira.masks.random.permute``; keys are 64-bit words, contiguous."""
        wide = numel > 2**31
        images = keys.new_empty(count, dtype=torch.int64 if wide else torch.int32)
        self._call["permute"](
            start, count, numel, *grid, keys.data_ptr(), keys.numel(), images.data_ptr(),
            int(wide), _threads(count),
        )  # fmt: skip
        return images

    def ascending(self, points: Tensor, numel: int) -> None:
        """Sort, in place, distinct int32 points of ``[0, numel)``; takes ``numel / 8`` bytes."""
        marks = points.new_zeros((numel + 63) // 64, dtype=torch.int64)
        self._call["ascending"](points.data_ptr(), points.numel(), marks.data_ptr(), marks.numel())


class DeltaWrite:
    """A write of ``round(original + delta)`` to entries, in one pass with reading the originals.

    A `shira.ops.memory.Write`, in few Python steps: between large products the code and data of
    each come from memory again. The weight is contiguous, of a dtype in `KINDS`; its entries are
    in ``originals``, ``(k,)``, once the delta is put in, or are given if it is in it already.
    """

    __slots__ = (
        *("_delta", "_entries", "_gaps", "_how", "_inside", "_kernels", "_weight", "originals"),
    )

    def __init__(
        self, kernels: Kernels, weight: Tensor, gaps: Gaps, delta: Tensor,
        originals: Tensor | None = None,
    ) -> None:  # fmt: skip
        if delta.dtype != torch.float32 or not delta.is_contiguous():
            delta = delta.float().contiguous()
        self._kernels, self._weight, self._gaps, self._delta = kernels, weight, gaps, delta
        # The C call itself says that it has written: an interrupt may come right after it, before
        # anything in Python could.
        self._inside = ctypes.c_int(originals is not None)
        self.originals = weight.new_empty(gaps.nnz) if originals is None else originals
        units = gaps.units
        # not the weight's address: its memory may be moved before an interrupted write is undone
        self._entries = units.data_ptr(), units.itemsize, units.numel(), gaps.marks.data_ptr()
        threads = 1 if gaps.nnz < _SHORT else torch.get_num_threads()
        self._how = ctypes.byref(self._inside), KINDS[weight.dtype], threads

    def put_in(self) -> None:
        """Write, and keep what was there."""
        delta, originals = self._delta.data_ptr(), self.originals.data_ptr()
        self._kernels._enter(self._weight.data_ptr(), *self._entries, delta, originals, *self._how)

    def put_back(self) -> None:
        """Write the originals back, if `put_in` has written."""
        weight, originals = self._weight.data_ptr(), self.originals.data_ptr()
        self._kernels._leave(weight, *self._entries, originals, *self._how)


@cache
def load() -> Loaded:
    """Load the kernels of this installation."""
    if not LIBRARY.exists():
        return Loaded(
            None,
            "the compiled kernels are missing (there was no C compiler when shira was installed): "
            "install one, then run python -m shira.ops.native.build",
        )
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=os.RTLD_LOCAL)
    except OSError as error:
        return Loaded(None, f"the compiled kernels do not load: {error}")
    version = library.shira_native_version()
    if version != VERSION:
        return Loaded(
            None,
            f"the compiled kernels are of another version ({version}, not {VERSION}): run "
            "python -m shira.ops.native.build",
        )
    best = int(library.shira_instruction_set())
    return Loaded(Kernels(library, _SETS[best]), f"compiled kernels for {_SETS[best]}")


def kernels_for(instruction_set: str) -> Kernels:
    """Load the kernels for one instruction set (``base``, ``avx2``, ``avx512``): for tests."""
    return Kernels(ctypes.CDLL(str(LIBRARY)), instruction_set)


def second_level_cache() -> int:
    """Return the bytes of a core's second-level cache, which `entries` goes by: for benchmarks."""
    return int(ctypes.CDLL(str(LIBRARY)).shira_second_level_cache())


def _rows_contiguous(operand: Tensor) -> Tensor:
    # the same values with each row in one piece of memory; a copy only where it must be
    return operand if operand.stride(1) == 1 or operand.shape[1] == 1 else operand.contiguous()


def _patch(patch: tuple[Tensor, ...] | None) -> tuple[int | None, ...]:
    if patch is None:
        return None, None, None, 0
    return *(part.data_ptr() for part in patch), patch[0].numel()


def _threads(entries: int) -> int:
    return torch.get_num_threads() if entries >= _SHORT else 1
