# SPDX-License-Identifier: Apache-2.0
"""An adapter merged into a checkpoint on disk.

Everything is read and checked first: names, shapes, dtypes, the fingerprint of the base, and the k
values that are to be written. Then the folder is copied and the entries are overwritten in the
copy. Memory is that of the adapter and one small window, whatever the size of the checkpoint.

What is written is ``round(base + scale * delta)``, summed as `shira.base.replacement` sums, so the
result has the bits of a model that was loaded, merged in memory and saved.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import Verdict, accept, fingerprint, judge
from shira.checkpoints.conversion import Place
from shira.checkpoints.entries import Edit, Progress, Written, check_output, read_entries, rewrite
from shira.checkpoints.locating import check_untied, locate_deltas, without_tied
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.convert.patches import Entries, replacing_undo
from shira.delta import SparseDelta, checked_scale
from shira.errors import ConfigError, MergeError
from shira.store.atomic import check_kind, check_outputs
from shira.store.header import FLOATS, WHOLE_DTYPES, Stored, bits_of
from shira.support import Support, index_dtype


@dataclass(frozen=True)
class MergedTensor:
    """The report of a merge on one tensor.

    Attributes:
        name: The parameter or buffer, as the adapter calls it.
        key: The tensor, as the checkpoint calls it; the first of those that it lies in.
        file: The file that holds it, likewise.
        dtype: Its dtype there, as ``"bfloat16"``.
    """

    name: str
    key: str
    file: str
    dtype: str


@dataclass(frozen=True)
class MergedDelta(MergedTensor):
    """The report on a tensor that a delta was added to.

    Attributes:
        nnz: Entries of the adapter (k).
        nonzero: Deltas other than zero among them.
        lost: Those that rounding swallows: the entry stays as it was.
        base: Whether the base is the adapter's.
    """

    nnz: int
    nonzero: int
    lost: int
    base: Verdict


@dataclass(frozen=True)
class MergedWhole(MergedTensor):
    """The report on a tensor that the adapter holds as a whole, rounded to the dtype there.

    Attributes:
        shape: Its shape.
        changed: Entries that are other bits than the base's.
    """

    shape: tuple[int, ...]
    changed: int


@dataclass(frozen=True)
class Merged:
    """The report of a merge.

    Attributes:
        output: Where the merged checkpoint is.
        undo: Where the undo file is, if one was asked for.
        naming: How the adapter's names became the checkpoint's, in words.
        targets: Weight by weight.
        written: The files.
        whole: What was written as a whole, such as a trained head.
    """

    output: Path
    undo: Path | None
    naming: str
    targets: tuple[MergedDelta, ...]
    written: Written
    whole: tuple[MergedWhole, ...] = ()

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
        """Return everything as JSON can hold it."""
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

    Example:
        >>> from safetensors.torch import load_file, save_file
        >>> save_file({"w": torch.ones(2, 3)}, "base.safetensors")
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([4])), torch.tensor([0.5]))
        >>> told = shira.convert.merge(
        ...     Adapter({"w": delta}), "base.safetensors", "merged.safetensors", undo="undo"
        ... )
        >>> load_file("merged.safetensors")["w"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.5, 1.0]]
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
    target = check_output(checkpoint.path.is_dir(), output, overwrite)
    undo_path = None if undo is None else Path(os.path.abspath(undo))
    if undo_path is not None:
        check_kind(undo_path)
        if undo_path.exists() and not overwrite:
            raise ConfigError(f"the undo file {undo_path} exists; overwrite it (--overwrite)")
    if not isinstance(adapter, Adapter):
        adapter = Adapter.load(adapter, base=checkpoint)
    adapter.require_scale_one("the adapter", scale)
    adapter, heads = without_tied(adapter, checkpoint)
    located, prefix = locate_deltas(adapter, checkpoint, adapter.tensors)
    check_untied((located[name] for name in located if name not in heads), checkpoint)
    for name, place in located.items():
        _check_dtype(name, place, checkpoint, adapter.tensors.get(name))
    first = {name: place.stored[0] for name, place in located.items()}
    order = sorted(located, key=lambda name: (str(first[name].file), first[name].start))
    changes = [_change(name, adapter, located[name], scale) for name in order]
    targets = tuple(told for told, _ in changes if isinstance(told, MergedDelta))
    if check_base:
        verdicts = {told.name: told.base for told in targets}
        remedy = "check_base=False, --no-check-base"
        accept(adapter.metadata, verdicts, str(checkpoint.path), remedy, warn=False)
    lost, nonzero = sum(t.lost for t in targets), sum(t.nonzero for t in targets)
    if lost > max_lost * nonzero:
        worst = max(targets, key=lambda t: t.lost / max(t.nonzero, 1))
        raise MergeError(
            f"rounding swallows {lost} of {nonzero} deltas ({lost / nonzero:.1%}), more than the "
            f"{max_lost:.1%} allowed; most in {worst.key!r} ({worst.dtype}). Merge into a "
            "checkpoint of a wider dtype, or allow more"
        )
    edited = _by_tensor([piece for _, pieces in changes for piece in pieces])
    undone = [_undone(old, edit) for old, edit in edited if edit.values.numel()]
    with replacing_undo(undo_path, undone) if undo_path else nullcontext(lambda: None) as put:
        edits = [edit for _, edit in edited]
        written = rewrite(checkpoint, edits, target, progress, put)
    whole = tuple(told for told, _ in changes if isinstance(told, MergedWhole))
    naming = str(prefix)
    if any(prefix.apply(name) != place.key for name, place in located.items()):
        naming += f"; the file's by {checkpoint.places.mapped} of transformers"
    return Merged(target, undo_path, naming, targets, written, whole)


def _check_dtype(name: str, place: Place, checkpoint: Checkpoint, whole: Tensor | None) -> None:
    """Refuse a stored tensor that no delta can be added to, or that ``whole`` cannot replace."""
    if place.fault:
        raise MergeError(f"{checkpoint.path}: {place.fault}")
    where = f"{place.stored[0].file}: {place.key!r}"
    if whole is not None and WHOLE_DTYPES.get(place.dtype) == whole.dtype:
        return
    if len({stored.dtype for stored in place.stored}) > 1:
        raise MergeError(
            f"{where}: {name!r} lies in tensors of several dtypes, {place.dtype}, which loading "
            "casts to one; save the loaded model (save_pretrained) and merge into that"
        )
    if place.dtype not in FLOATS:
        raise MergeError(
            f"{where} has dtype {place.dtype}: it is quantized or no "
            f"weight, and a delta can be added to {', '.join(FLOATS)} alone; merge into the "
            "checkpoint that it was quantized from"
        )
    if whole is not None and not whole.is_floating_point():
        raise MergeError(
            f"{where} has dtype {place.dtype}, and the adapter's whole tensor {whole.dtype}"
        )


class _Piece(NamedTuple):
    """The entries of a parameter, in one tensor, whose bits change."""

    stored: Stored
    flat: Tensor  # (n,) increasing
    old: Tensor
    new: Tensor


def _change(
    name: str, adapter: Adapter, place: Place, scale: float
) -> tuple[MergedDelta | MergedWhole, list[_Piece]]:
    """Return the report on a parameter, and the entries whose bits change."""
    if whole := name in adapter.tensors:
        tensor = adapter.tensors[name].reshape(-1).cpu()
        flat = torch.arange(tensor.numel(), dtype=index_dtype(tensor.numel()), device="cpu")
        old = read_entries(place, flat)
        new = tensor.to(old.dtype)
    else:
        values, flat = adapter[name].values.cpu(), adapter[name].support.indices.cpu()
        old = read_entries(place, flat)
        new = SparseDelta(adapter[name].support, values).replacement(old, scale)
    over = int((old.isfinite() & ~new.isfinite()).sum())
    if over:
        raise MergeError(
            f"{place.stored[0].file}: {name!r}: {over} of {new.numel()} sums are too large for "
            f"{place.dtype}; use a smaller scale, or a checkpoint of a wider dtype"
        )
    changed = bits_of(new) != bits_of(old)
    where = (name, place.key, place.file, str(old.dtype).removeprefix("torch."))
    told: MergedDelta | MergedWhole
    if whole:
        told = MergedWhole(*where, shape=place.shape, changed=int(changed.sum()))
    else:
        nonzero = values != 0 if scale else torch.zeros_like(values, dtype=torch.bool)
        told = MergedDelta(
            *where,
            nnz=values.numel(),
            nonzero=int(nonzero.sum()),
            lost=int((nonzero & (new == old)).sum()),
            base=judge(adapter.metadata, name, values, old),
        )
    flat, old, new = flat[changed], old[changed], new[changed]
    parts = place.split(flat)
    return told, [_Piece(stored, at, old[here], new[here]) for stored, here, at in parts]


def _by_tensor(pieces: Sequence[_Piece]) -> list[tuple[Tensor, Edit]]:
    """Return one edit for each tensor of the checkpoint, with the values that stood there."""
    grouped: dict[str, list[_Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.stored.key, []).append(piece)
    edits = []
    for key, some in grouped.items():
        flat = torch.cat([piece.flat for piece in some])
        old, new = torch.cat([p.old for p in some]), torch.cat([p.new for p in some])
        if len(some) > 1:
            flat, order = flat.sort()
            old, new = old[order], new[order]
        if bool((flat[1:] == flat[:-1]).any()):
            raise MergeError(
                f"{some[0].stored.file}: entries of {key!r} are those of several parameters of the "
                "adapter; save the loaded model (save_pretrained) and merge into that"
            )
        edits.append((old, Edit(some[0].stored, flat, new)))
    return edits


def _undone(old: Tensor, edit: Edit) -> Entries:
    """Return what undoes an edit."""
    stored = edit.stored
    told = {
        "file": stored.file.name, "shape": list(stored.shape), "merged": fingerprint(edit.values)
    }  # fmt: skip
    flat = edit.flat.to(index_dtype(math.prod(stored.shape)))
    return Entries(stored.key, told, Support._trusted(stored.shape, flat), old)
