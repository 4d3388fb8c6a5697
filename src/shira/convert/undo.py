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
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shira.convert.entry_file import Entries, Kind, read, sizes, write
from shira.errors import FileFormatError
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


def _shape(told: object) -> list[int]:
    """The shape, if file and fingerprint are told too."""
    if not isinstance(told, dict) or not all(
        isinstance(told.get(n), str) for n in ("file", "merged")
    ):
        raise FileFormatError("file, shape and merged are told")
    return sizes(told.get("shape"))


_FILE = Kind(
    "shira-undo", "1", "an undo file of shira merge --undo", ".originals", "tensors", _shape
)
