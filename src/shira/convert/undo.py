# SPDX-License-Identifier: Apache-2.0
"""Undoing a merge: the file of what stood at the entries that it changed, and the base's bytes.

An undo file is safetensors. For each tensor of the checkpoint with an entry changed:

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shira.base import fingerprint
from shira.checkpoints.entries import Edit, Progress, Written, check_output, read_entries, rewrite
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.convert.patches import Entries, Kind, read_entry_file, write_entry_file
from shira.errors import WrongBaseError
from shira.store.atomic import check_outputs, write_atomically
from shira.store.header import WHOLE_DTYPES
from shira.store.json_text import shape_in


@dataclass(frozen=True)
class Unmerged:
    """The report of an undoing.

    Attributes:
        output: Where the restored checkpoint is.
        tensors: The number of tensors that had entries put back.
        entries: The number of entries.
        written: The files.
    """

    output: Path
    tensors: int
    entries: int
    written: Written

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {**asdict(self), "output": str(self.output)}


def unmerge(
    merged: str | os.PathLike[str],
    undo: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Unmerged:
    """Write a copy of a merged checkpoint with the originals put back: the base's own bytes.

    Args:
        merged: What `merge` wrote, in the files that it wrote.
        undo: The undo file that it wrote.
        output: Where the restored one goes. It appears as a whole.
        overwrite: Replace an output that is there already.
        progress: Told the bytes done and those there are in all.

    Raises:
        FileNotFoundError: If one of the two is not there.
        FileFormatError: If one of the two is damaged.
        WrongBaseError: If the undo file belongs to another checkpoint, or this one has changed
            since the merge.
        ConfigError: If the output exists, or would overwrite or overlap what is read.
    """
    checkpoint = open_checkpoint(merged)
    check_outputs({"output": output}, undo_files(undo), [checkpoint.path])
    target = check_output(checkpoint, output, overwrite)
    edits = _edits_back(undo, checkpoint)
    written = rewrite(checkpoint, edits, target, progress)
    return Unmerged(target, len(edits), sum(edit.flat.numel() for edit in edits), written)


@contextmanager
def replacing_undo(path: Path, undone: Sequence[Entries]) -> Iterator[Callable[[], None]]:
    """Give a function that writes the undo file; call it right before the checkpoint is replaced.

    An undo file that is there already is removed at the end of the block. If the block does not
    end well, or not at all, one of `undo_files` undoes whichever checkpoint is there.
    """

    def put() -> None:
        if path.exists():
            names = (path.with_name(f"{path.name}.before{n or ''}") for n in itertools.count())
            kept = next(name for name in names if not name.exists())
            write_atomically(kept, path.read_bytes())
        write_entry_file(path, _UNDO, undone)

    yield put
    for kept in undo_files(path)[1:]:
        kept.unlink()


def undo_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the undo file, and older ones that a killed merge has left beside it."""
    path = Path(path)
    before = re.compile(rf"{re.escape(path.name)}\.before[0-9]*")
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    return [path, *(file for file in beside if before.fullmatch(file.name))]


def _edits_back(undo: str | os.PathLike[str], checkpoint: Checkpoint) -> list[Edit]:
    """Read the originals from the undo file, or from an older one that fits this checkpoint."""
    errors = []
    for file in undo_files(undo):
        try:
            return [_edit_back(one, checkpoint, file) for one in read_entry_file(file, _UNDO)]
        except WrongBaseError as error:
            errors.append(error)
    raise errors[0]


def _edit_back(one: Entries, checkpoint: Checkpoint, undo: Path) -> Edit:
    """Put back into one tensor, after making sure that it holds what the merge wrote."""
    key, told, support, originals = one
    stored = checkpoint.tensors.get(key)
    # A checkpoint of a single file may have been renamed; a shard of several may not.
    single = len(checkpoint.files) == 1
    if (
        stored is None
        or not (single or stored.file.name == told["file"])
        or stored.shape != support.shape
        or WHOLE_DTYPES.get(stored.dtype) != originals.dtype
    ):
        raise WrongBaseError(
            f"{undo}: it undoes a merge into {key!r} of shape {support.shape} in {told['file']}, "
            f"which {checkpoint.path} does not have; is it of this merge?"
        )
    if fingerprint(read_entries(stored, support.indices)) != told["merged"]:
        raise WrongBaseError(
            f"{checkpoint.path}: {key!r} does not hold what the merge of {undo} wrote: it is not "
            "merged, changed since, or of another merge"
        )
    return Edit(stored, support.indices, originals)


def _undo_shape(told: object) -> tuple[int, ...]:
    """Return the shape, if file and fingerprint are told too."""
    texts = ("file", "merged")
    if not isinstance(told, dict) or not all(isinstance(told.get(name), str) for name in texts):
        raise ValueError("file, shape and merged are told")
    return shape_in(told.get("shape"))


_UNDO = Kind(
    *("shira-undo", "an undo file of shira merge --undo", ".originals", "tensors"),
    WHOLE_DTYPES,
    _undo_shape,
)
