# SPDX-License-Identifier: Apache-2.0
"""Single entries of a checkpoint's tensors: read on disk, and overwritten in a copy of it.

Neighbours are read and written together, in windows of at most `WINDOW` bytes, and stretches
without an entry are passed over; memory is one window and the entries. Nothing is mapped into
memory, so the pages of a file never count as the process's own.

`rewrite` copies files whole and then patches them at the entries alone, so headers, metadata, index
and the order of tensors stay as they are, and shards without an entry are plain copies. Everything
else in the folder comes along, but for other copies of the same weights, which would be the old
ones.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shira.checkpoints.conversion import Place
from shira.checkpoints.opening import Checkpoint
from shira.errors import ConfigError
from shira.store.atomic import replacing
from shira.store.header import WHOLE_DTYPES, Bits, Stored, bits_of, read_bits, tensor_of

Progress = Callable[[int, int], None]
"""Told how much is done (bytes, entries) and how much there is in all."""

WINDOW = 2**22
"""Bytes that are read at once, at most."""

_GAP = 2**14  # bytes without an entry that are cheaper read along than sought over
_CHUNK = 2**25  # bytes that are copied between two reports of progress

# Other files that hold the weights: formats of other libraries anywhere, and beside the checkpoint
# also what could be loaded in its place. (Below it may stand further parts of a larger model.)
_ANYWHERE = ("consolidated*.pth", "*.onnx", "*.onnx_data", "*.gguf", "openvino_model*.bin")
_BESIDE = (
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model*.h5", "flax_model*.msgpack",
    "rust_model.ot", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
_HIDDEN = (".git", ".cache")


def read_entries(place: Place | Stored, flat: Tensor) -> Tensor:
    """Read ``(k,)`` values of a parameter or stored tensor of one of the dtypes of `WHOLE_DTYPES`.

    Indices ``flat`` ``(k,)`` increase, within its shape, and are on the CPU.

    Raises:
        FileFormatError: If the file has become shorter meanwhile.
    """
    if isinstance(place, Stored):
        return _read(place, flat)
    parts = place.split(flat)
    if isinstance(place.source, Stored):
        return _read(place.source, flat)
    values = torch.empty(flat.numel(), dtype=WHOLE_DTYPES[place.dtype])
    for stored, entries, at in parts:
        values[entries] = _read(stored, at)
    return values


def _read(stored: Stored, flat: Tensor) -> Tensor:
    disk = np.dtype(f"<i{WHOLE_DTYPES[stored.dtype].itemsize}")
    found = np.empty(flat.numel(), disk)
    where = flat.numpy()
    with open(stored.file, "rb", buffering=0) as file:
        for low, high, first, span in _spans(file, stored, where):
            found[low:high] = span[where[low:high] - first]
    return tensor_of(found, stored)


def read_blocks(place: Place | Stored, size: int) -> Iterator[Tensor]:
    """Read a parameter or stored tensor in flat pieces of at most ``size`` entries."""
    count = math.prod(place.shape)
    if isinstance(place, Place) and not isinstance(place.source, Stored):
        for first in range(0, count, size):
            yield read_entries(place, torch.arange(first, min(first + size, count)))
        return
    stored = place.stored[0] if isinstance(place, Place) else place
    with open(stored.file, "rb", buffering=0) as file:
        for first in range(0, count, size):
            yield tensor_of(read_bits(file, stored, first, min(size, count - first)), stored)


def _spans(
    file: BinaryIO, stored: Stored, where: NDArray[np.signedinteger]
) -> Iterator[tuple[int, int, int, Bits]]:
    """Read runs ``low:high`` of increasing indices, each with the bits from the first one on."""
    itemsize = WHOLE_DTYPES[stored.dtype].itemsize
    cuts = np.flatnonzero(np.diff(where) > _GAP // itemsize) + 1
    length = WINDOW // itemsize
    for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), where.size], strict=True):
        while low < high:
            first = int(where[low])
            stop = low + int(np.searchsorted(where[low:high], first + length))
            yield low, stop, first, read_bits(file, stored, first, int(where[stop - 1]) + 1 - first)
            low = stop


@dataclass(frozen=True)
class Edit:
    """New values for some entries of one tensor of the checkpoint that is copied."""

    stored: Stored
    flat: Tensor  # (k,) increasing flat indices
    values: Tensor  # (k,) in the tensor's dtype


@dataclass(frozen=True)
class Written:
    """The files of a rewritten copy.

    Attributes:
        patched: Files with an entry overwritten.
        copied: Files that are plain copies.
        left_out: Files that were not carried along: other copies of the weights, hidden folders.
        size: Bytes in all.
    """

    patched: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    size: int


def check_output(folder: bool, output: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the path of an output, a folder or a file, after making sure that it may go there.

    (`check_outputs` keeps it apart from what is read.)
    """
    target = Path(os.path.abspath(output))
    if not (target.exists() or target.is_symlink()):
        return target
    if not overwrite:
        raise ConfigError(f"output {target} exists; overwrite it (--overwrite), or name another")
    if target.is_symlink() or target.is_dir() != folder:
        raise ConfigError(f"output {target} exists and is of another kind; name another")
    if target.is_dir() and any(target.iterdir()) and not any(target.glob("*.safetensors")):
        raise ConfigError(
            f"output {target} is a folder of something else (it holds no safetensors file), and is "
            "not overwritten; name another"
        )
    return target


def rewrite(
    checkpoint: Checkpoint,
    edits: Sequence[Edit],
    output: Path,
    progress: Progress | None = None,
    last: Callable[[], None] = lambda: None,
) -> Written:
    """Write a copy with the edits made, in the place of whatever is at ``output``.

    There is at most one edit a tensor; the output is from `check_output`; ``last`` is called when
    the copy is complete, right before it takes its place.

    Raises:
        OSError: If the disk is full and the like; nothing has changed then.
    """
    by_file: dict[Path, list[Edit]] = {}
    for edit in edits:
        if edit.flat.numel():
            by_file.setdefault(edit.stored.file, []).append(edit)
    folder = checkpoint.path.is_dir()
    files, left_out = files_of(checkpoint) if folder else ({checkpoint.path: ""}, [])
    total = sum(source.stat().st_size for source in files)
    count = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, folder=folder) as temporary:
        for source, name in files.items():
            target = temporary / name if name else temporary
            target.parent.mkdir(parents=True, exist_ok=True)
            for size in copy_file(source, target, by_file.get(source, ())):
                count += size
                if progress is not None:
                    progress(count, total)
        last()
    patched = [name or source.name for source, name in files.items() if source in by_file]
    plain = [name or source.name for source, name in files.items() if source not in by_file]
    return Written(tuple(patched), tuple(plain), tuple(left_out), total)


def copy_file(source: Path, target: Path, edits: Sequence[Edit] = ()) -> Iterator[int]:
    """Copy a file, its permissions too, and make the edits; give the bytes of each piece copied.

    Symbolic links are followed. The kernel copies where it can (and shares the bytes where the file
    system can), so no memory is needed; else they go through a small buffer. At the end the bytes
    are on the disk.
    """
    with open(source, "rb", buffering=0) as old, open(target, "w+b", buffering=0) as new:
        size = left = os.fstat(old.fileno()).st_size
        copy = getattr(os, "copy_file_range", None)
        while left and copy is not None:
            try:
                count = copy(old.fileno(), new.fileno(), min(left, _CHUNK))
            except OSError:  # another file system, or one that cannot
                break
            if not count:
                break
            left -= count
            yield count
        old.seek(size - left)
        new.seek(size - left)
        while piece := old.read(2**20):
            new.write(piece)
            yield len(piece)
        for edit in edits:
            write_entries(new, edit)
        os.fsync(new.fileno())
    shutil.copymode(source, target)


def write_entries(file: BinaryIO, edit: Edit) -> None:
    """Overwrite entries in a copy of their file, open for reading and writing, unbuffered."""
    where, new = edit.flat.numpy(), bits_of(edit.values).numpy()
    for low, high, first, span in _spans(file, edit.stored, where):
        span[where[low:high] - first] = new[low:high]
        file.seek(edit.stored.start + first * span.itemsize)
        rest = span.data.cast("B")
        while rest:
            rest = rest[file.write(rest) :]


def files_of(checkpoint: Checkpoint) -> tuple[Mapping[Path, str], list[str]]:
    """Return each file of the folder that comes along with its path in it, and what stays."""
    along: dict[Path, str] = {}
    behind: list[str] = []
    own = {*checkpoint.files, checkpoint.index}
    for here, folders, files in os.walk(checkpoint.path):
        # folders that are not entered: hidden ones and links
        stay = [n for n in folders if n in _HIDDEN or os.path.islink(os.path.join(here, n))]
        folders[:] = sorted(set(folders) - set(stay))
        other = (*_ANYWHERE, *(_BESIDE if Path(here) == checkpoint.path else ()))
        for path in (Path(here, name) for name in sorted(files) + stay):
            name = path.relative_to(checkpoint.path).as_posix()
            weights = any(fnmatch(path.name, pattern) for pattern in other)
            if path in own or (path.is_file() and not weights):
                along[path] = name
            else:
                behind.append(name)
    return along, behind
