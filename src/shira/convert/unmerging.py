# SPDX-License-Identifier: Apache-2.0
"""From a merged checkpoint and its undo file back to the bytes of the base."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shira.base import fingerprint
from shira.checkpoints.entries import read_entries
from shira.checkpoints.opening import Checkpoint, Stored, open_checkpoint
from shira.convert.rewriting import Edit, Progress, Written, check_output, rewrite
from shira.convert.undo import Undone, read_undo, undo_files
from shira.errors import WrongBaseError
from shira.store.atomic import check_outputs
from shira.store.header import WHOLE_DTYPES


@dataclass(frozen=True)
class Unmerged:
    """What an undoing did.

    Attributes:
        output: Where the restored checkpoint is.
        tensors: How many tensors had entries put back.
        entries: How many entries.
        written: The files.
    """

    output: Path
    tensors: int
    entries: int
    written: Written

    def as_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold."""
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
    edits = _edits(undo, checkpoint)
    written = rewrite(checkpoint, edits, target, progress)
    return Unmerged(target, len(edits), sum(edit.flat.numel() for edit in edits), written)


def _edits(undo: str | os.PathLike[str], checkpoint: Checkpoint) -> list[Edit]:
    """Read the originals from the undo file, or from an older one that fits this checkpoint."""
    errors = []
    for file in undo_files(undo):
        try:
            return [_edit(one, checkpoint, file) for one in read_undo(file)]
        except WrongBaseError as error:
            errors.append(error)
    raise errors[0]


def _edit(one: Undone, checkpoint: Checkpoint, undo: Path) -> Edit:
    """What is put back into one tensor, after making sure that it holds what the merge wrote."""
    stored = checkpoint.tensors.get(one.key)
    if stored is None or not _fits(one, stored, checkpoint):
        raise WrongBaseError(
            f"{undo}: it undoes a merge into {one.key!r} of shape {one.support.shape} in "
            f"{one.file}, which {checkpoint.path} does not have; is it of this merge?"
        )
    flat = one.support.indices
    with open(stored.file, "rb", buffering=0) as file:
        held = read_entries(file, stored, flat)
    if fingerprint(held) != one.merged:
        raise WrongBaseError(
            f"{checkpoint.path}: {one.key!r} does not hold what the merge of {undo} wrote: it is "
            "not merged, changed since, or of another merge"
        )
    return Edit(stored, flat, one.originals)


def _fits(one: Undone, stored: Stored, checkpoint: Checkpoint) -> bool:
    dtype: torch.dtype | None = WHOLE_DTYPES.get(stored.dtype)
    # A checkpoint of a single file may have been renamed; a shard of several may not.
    placed = len(checkpoint.files) == 1 or stored.file.name == one.file
    return placed and stored.shape == one.support.shape and dtype == one.originals.dtype
