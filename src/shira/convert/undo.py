# SPDX-License-Identifier: Apache-2.0
"""The undo file of a merge: what stood at the entries that it changed.

A safetensors file. For each tensor of the checkpoint with an entry changed:

- ``<key>.indices`` ``(k,)`` I32 (I64 from 2^31 entries on): increasing flat indices of the entries
  whose bits changed;
- ``<key>.originals`` ``(k,)`` in the tensor's own dtype: their bits before.

``__metadata__``: ``format`` is ``"shira-undo"``, ``version`` is ``"1"``, and ``tensors`` is JSON,
``{key: {"file": ..., "shape": [...], "merged": ...}}``: the file that holds the tensor, its shape,
and the fingerprint of what the merge wrote there. So an undo file is 6 bytes for each changed entry
of a bfloat16 checkpoint, and is applied only to the very checkpoint that it belongs to.

A merge over an older one replaces two things, the checkpoint and its undo file, and no file system
does that in one step. So the older undo file is kept beside the new one, as ``<name>.before`` or
``<name>.before1``, until the checkpoint is in its place; `undo_files` lists both.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shira.convert.entry_file import Entries, Kind, read, sizes, write
from shira.errors import FileFormatError
from shira.store.atomic import write_atomically
from shira.store.header import WHOLE_DTYPES
from shira.support import Support


@dataclass(frozen=True)
class Undone:
    """What to put back into one tensor.

    Attributes:
        key: Its name in the checkpoint.
        file: The file that holds it, by its name in the checkpoint.
        support: The entries that changed.
        originals: ``(k,)`` what stood there, in the tensor's dtype.
        merged: Fingerprint of what the merge wrote.
    """

    key: str
    file: str
    support: Support
    originals: Tensor
    merged: str


def write_undo(path: str | os.PathLike[str], undone: Sequence[Undone]) -> None:
    """Write an undo file, atomically."""
    entries = (
        Entries(
            one.key,
            {"file": one.file, "shape": list(one.support.shape), "merged": one.merged},
            one.support,
            one.originals,
        )
        for one in undone
    )
    write(path, _FILE, entries)


def read_undo(path: str | os.PathLike[str]) -> list[Undone]:
    """Read and check an undo file.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, or no undo file.
    """
    return [
        Undone(key, told["file"], support, originals, told["merged"])
        for key, told, support, originals in read(path, _FILE)
    ]


@contextmanager
def replacing_undo(path: Path, undone: Sequence[Undone]) -> Iterator[Callable[[], None]]:
    """Give a function that writes the undo file; call it right before the checkpoint is replaced.

    An undo file that is there already is removed at the end of the block. If the block does not
    end well, or not at all, one of `undo_files` undoes whichever checkpoint is there.
    """

    def put() -> None:
        if path.exists():
            names = (path.with_name(f"{path.name}.before{n or ''}") for n in itertools.count())
            kept = next(name for name in names if not name.exists())
            write_atomically(kept, path.read_bytes())
        write_undo(path, undone)

    yield put
    for kept in undo_files(path)[1:]:
        kept.unlink()


def undo_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the undo file, and older ones that a killed merge has left beside it."""
    path = Path(path)
    before = re.compile(rf"{re.escape(path.name)}\.before[0-9]*")
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    return [path, *(file for file in beside if before.fullmatch(file.name))]


def _shape(told: object) -> list[int]:
    """The shape, if file and fingerprint are told too."""
    if not isinstance(told, dict) or not all(
        isinstance(told.get(n), str) for n in ("file", "merged")
    ):
        raise FileFormatError("file, shape and merged are told")
    return sizes(told.get("shape"))


_FILE = Kind(
    "shira-undo",
    "1",
    "an undo file of shira merge --undo",
    ".originals",
    "tensors",
    WHOLE_DTYPES,
    _shape,
)
