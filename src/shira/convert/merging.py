# SPDX-License-Identifier: Apache-2.0
"""Merging an adapter into a checkpoint on disk.

Everything is read and checked first: names, shapes, dtypes, the fingerprint of the base, and the k
values that are to be written. Then the folder is copied and the entries are overwritten in the
copy. Memory is that of the adapter and one small window, whatever the size of the checkpoint.

What is written is ``round(base + scale * delta)``, summed as `shira.base.replacement` sums, so the
result has the bits of a model that was loaded, merged in memory and saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import Verdict, accept, fingerprint, judge
from shira.checkpoints.entries import read_entries
from shira.checkpoints.naming import check_untied, locate_deltas
from shira.checkpoints.opening import FLOATS, Checkpoint, Stored, open_checkpoint
from shira.convert.rewriting import Edit, Progress, Written, check_output, rewrite
from shira.convert.undo import Undone, replacing_undo
from shira.delta import SparseDelta, checked_scale
from shira.errors import ConfigError, MergeError
from shira.store.atomic import check_outputs
from shira.store.header import WHOLE_DTYPES
from shira.support import Support, index_dtype

REMEDY = "check_base=False, --no-check-base"
"""The option that lets a conversion use another base, for error messages."""


@dataclass(frozen=True)
class Target:
    """What a merge does to one tensor.

    Attributes:
        name: The parameter, as the adapter calls it.
        key: The tensor, as the checkpoint calls it.
        file: The file that holds it.
        dtype: Its dtype, as ``"bfloat16"``.
        nnz: Entries of the adapter (k).
        nonzero: Deltas other than zero among them.
        lost: Those that rounding swallows: the entry stays as it was.
        base: Whether the base is the adapter's.
    """

    name: str
    key: str
    file: str
    dtype: str
    nnz: int
    nonzero: int
    lost: int
    base: Verdict


@dataclass(frozen=True)
class Whole:
    """The report of a merge on a tensor that the adapter holds as a whole.

    Attributes:
        name: The parameter or buffer, as the adapter calls it.
        key: The tensor, as the checkpoint calls it.
        file: The file that holds it.
        dtype: Its dtype there, to which the adapter's is rounded.
        shape: Its shape.
        changed: Entries that are other bits than the base's.
    """

    name: str
    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    changed: int


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        output: Where the merged checkpoint is.
        undo: Where the undo file is, if one was asked for.
        naming: How the adapter's names became the checkpoint's, in words.
        targets: Tensor by tensor.
        written: The files.
        whole: What was written as a whole, such as a trained head.
    """

    output: Path
    undo: Path | None
    naming: str
    targets: tuple[Target, ...]
    written: Written
    whole: tuple[Whole, ...] = ()

    @property
    def nnz(self) -> int:
        """Entries of the adapter."""
        return sum(target.nnz for target in self.targets)

    @property
    def nonzero(self) -> int:
        """Deltas other than zero."""
        return sum(target.nonzero for target in self.targets)

    @property
    def lost(self) -> int:
        """Deltas that rounding to the checkpoint's dtype swallowed."""
        return sum(target.lost for target in self.targets)

    def as_json(self) -> dict[str, Any]:
        """Everything, in what JSON can hold."""
        return {
            "output": str(self.output),
            "undo": None if self.undo is None else str(self.undo),
            "naming": self.naming,
            "nnz": self.nnz,
            "nonzero": self.nonzero,
            "lost_to_rounding": self.lost,
            "files": asdict(self.written),
            "targets": [asdict(target) for target in self.targets],
            "whole_tensors": [asdict(whole) for whole in self.whole],
        }


def merge(
    adapter: Adapter | str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    undo: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    max_lost: float = 1.0,
    progress: Progress | None = None,
) -> Merged:
    """Write a copy of a checkpoint with an adapter merged into it.

    Whole tensors of the adapter are written in the place of the checkpoint's, rounded once to its
    dtype.

    Args:
        adapter: The adapter, or its path.
        base: A safetensors checkpoint: a folder, one file, or a name on the hub.
        output: Where the merged one goes: a folder or file, as ``base`` is. It appears as a whole.
        scale: Factor on the deltas; 1 if the adapter has whole tensors.
        undo: Write there what `unmerge` needs to restore the base's bytes.
        overwrite: Replace an output or undo file that is there already.
        check_base: Refuse a base without the values that the adapter was trained on, as far as
            its fingerprint can tell.
        max_lost: Refuse if rounding swallows more than this share of the deltas, from 0 to 1.
        progress: Told the bytes done and those there are in all.

    Raises:
        FileNotFoundError: If the adapter or the base is not there.
        FileFormatError: If one of them is damaged.
        WrongBaseError: If the base lacks a parameter, has it in another shape, or holds other
            values under the entries.
        AdapterError: If whole tensors are to be scaled.
        MergeError: If a tensor is quantized or otherwise no floating-point number that can be
            added to, is tied to another, a sum overflows its dtype, or too many deltas are lost.
        ConfigError: If the output or the undo file exists, or would overwrite or overlap what is
            read or each other.
    """
    scale = checked_scale("the adapter", scale)
    if not 0 <= max_lost <= 1:
        raise ConfigError(f"max_lost is a share from 0 to 1, not {max_lost!r}")
    checkpoint = open_checkpoint(base)
    check_outputs(
        {"output": output, "undo file": undo},
        [None if isinstance(adapter, Adapter) else adapter],
        [checkpoint.path],
    )
    target = check_output(checkpoint, output, overwrite)
    undo_path = None if undo is None else _check_undo(undo, overwrite)
    if not isinstance(adapter, Adapter):
        adapter = Adapter.load(adapter, base=checkpoint)
    adapter.require_scale_one("the adapter", scale)
    located, prefix = locate_deltas(adapter, checkpoint, adapter.tensors)
    check_untied(located.values(), checkpoint)
    for name, stored in located.items():
        _check_dtype(stored, adapter.tensors.get(name))
    changes = list(_changes(adapter, located, scale))
    targets = tuple(told for told, _, _ in changes if isinstance(told, Target))
    if check_base:
        verdicts = {told.name: told.base for told in targets}
        accept(adapter.metadata, verdicts, str(checkpoint.path), REMEDY, warn=False)
    _check_lost(targets, max_lost)
    edits = [edit for _, edit, _ in changes]
    if undo_path is None:
        written = rewrite(checkpoint, edits, target, progress)
    else:
        undone = [undone for _, _, undone in changes if undone.originals.numel()]
        with replacing_undo(undo_path, undone) as put:
            written = rewrite(checkpoint, edits, target, progress, put)
    whole = tuple(told for told, _, _ in changes if isinstance(told, Whole))
    return Merged(target, undo_path, str(prefix), targets, written, whole)


def _check_undo(undo: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the undo file's path, if a file may be written there."""
    path = Path(os.path.abspath(undo))
    if path.is_dir():
        raise ConfigError(f"the undo file {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ConfigError(f"the undo file {path} exists; overwrite it (--overwrite)")
    return path


def _check_dtype(stored: Stored, whole: Tensor | None) -> None:
    """Refuse a stored tensor that no delta can be added to, or whose place ``whole`` cannot take.

    A whole tensor is rounded from one floating dtype to another; a buffer of integers has one.
    """
    if whole is not None and WHOLE_DTYPES.get(stored.dtype) == whole.dtype:
        return
    if stored.dtype not in FLOATS:
        raise MergeError(
            f"{stored.file}: {stored.key!r} has dtype {stored.dtype}: it is quantized or no "
            f"weight, and a delta can be added to {', '.join(FLOATS)} alone; merge into the "
            "checkpoint that it was quantized from"
        )
    if whole is not None and not whole.is_floating_point():
        raise MergeError(
            f"{stored.file}: {stored.key!r} has dtype {stored.dtype}, and the adapter's whole "
            f"tensor {whole.dtype}"
        )


def _changes(
    adapter: Adapter, located: dict[str, Stored], scale: float
) -> Iterator[tuple[Target | Whole, Edit, Undone]]:
    """What to write into each tensor, and what is to be told of it."""
    names = sorted(located, key=lambda name: (str(located[name].file), located[name].start))
    for path, group in groupby(names, key=lambda name: located[name].file):
        with open(path, "rb", buffering=0) as file:
            for name in group:
                stored = located[name]
                if name not in adapter:
                    yield _whole_change(name, adapter.tensors[name], stored, file)
                    continue
                delta = adapter[name]
                flat = delta.support.indices.cpu()
                old = read_entries(file, stored, flat)
                verdict = judge(adapter.metadata, name, delta.values, old)
                yield _change(name, delta, stored, flat, old, scale, verdict)


def _change(
    name: str,
    delta: SparseDelta,
    stored: Stored,
    flat: Tensor,
    old: Tensor,
    scale: float,
    verdict: Verdict,
) -> tuple[Target, Edit, Undone]:
    new = SparseDelta(delta.support, delta.values.cpu()).replacement(old, scale)
    _check_overflow(name, stored, old, new)
    changed = bits(new) != bits(old)
    nonzero = delta.values.cpu() != 0 if scale else torch.zeros(flat.numel(), dtype=torch.bool)
    told = Target(
        name=name,
        key=stored.key,
        file=stored.file.name,
        dtype=str(old.dtype).removeprefix("torch."),
        nnz=flat.numel(),
        nonzero=int(nonzero.sum()),
        lost=int((nonzero & (new == old)).sum()),
        base=verdict,
    )
    return told, *_written(stored, flat[changed], old[changed], new[changed])


def _whole_change(
    name: str, tensor: Tensor, stored: Stored, file: BinaryIO
) -> tuple[Whole, Edit, Undone]:
    """Do as `_change` for a whole tensor; the cost follows its size, as all of it may change."""
    flat = torch.arange(tensor.numel(), dtype=index_dtype(tensor.numel()))
    old = read_entries(file, stored, flat)
    new = tensor.detach().reshape(-1).cpu().to(old.dtype)
    _check_overflow(name, stored, old, new)
    changed = bits(new) != bits(old)
    told = Whole(
        name=name,
        key=stored.key,
        file=stored.file.name,
        dtype=str(old.dtype).removeprefix("torch."),
        shape=stored.shape,
        changed=int(changed.sum()),
    )
    return told, *_written(stored, flat[changed], old[changed], new[changed])


def _written(stored: Stored, flat: Tensor, old: Tensor, new: Tensor) -> tuple[Edit, Undone]:
    """Return the entries whose bits change, to be written and to be put back."""
    support = Support._trusted(stored.shape, flat)
    undone = Undone(stored.key, stored.file.name, support, old, fingerprint(new))
    return Edit(stored, flat, new), undone


def bits(values: Tensor) -> Tensor:
    """The values as integers of their width, to tell 0.0 from -0.0."""
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(widths[values.element_size()])


def _check_lost(targets: Sequence[Target], most: float) -> None:
    lost, nonzero = sum(t.lost for t in targets), sum(t.nonzero for t in targets)
    if lost > most * nonzero:
        worst = max(targets, key=lambda t: t.lost / max(t.nonzero, 1))
        raise MergeError(
            f"rounding swallows {lost} of {nonzero} deltas ({lost / nonzero:.1%}), more than the "
            f"{most:.1%} allowed; most in {worst.key!r} ({worst.dtype}). Merge into a checkpoint "
            "of a wider dtype, or allow more"
        )


def _check_overflow(name: str, stored: Stored, old: Tensor, new: Tensor) -> None:
    over = int((old.isfinite() & ~new.isfinite()).sum())
    if over:
        raise MergeError(
            f"{stored.file}: {name!r}: {over} of {new.numel()} sums are too large for "
            f"{stored.dtype}; use a smaller scale, or a checkpoint of a wider dtype"
        )
