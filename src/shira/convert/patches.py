# SPDX-License-Identifier: Apache-2.0
"""Values of some entries of weights: sparse patches of a base, and what undoes a merge.

The coordinates of a patch are those of vLLM's own ``SparseWeightPatch``
(vllm.distributed.weight_transfer): the checkpoint's name of a weight, int32 flat indices,
replacement values in the weight's dtype, the whole shape. A patch needs no base to be applied, and
so knows neither scale nor delta. The undo file of a merge has the bits that stood at the entries
that it changed; both kinds of file (``docs/converting.md``) are written and read alike.

A merge over an older one replaces two things, the checkpoint and its undo file, and no file system
does that in one step. So the older undo file is kept beside the new one, as ``<name>.before`` or
``<name>.before1``, until the checkpoint is in its place; `undo_files` lists both.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.adapter import Adapter
from shira.base import Verdict, accept, fingerprint, judge
from shira.checkpoints.entries import Edit, Progress, Written, check_output, read_entries, rewrite
from shira.checkpoints.models import Model, names_in, source_of
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.delta import SparseDelta, checked_scale
from shira.errors import AdapterError, FileFormatError, WrongBaseError
from shira.store.atomic import check_outputs, write_atomically
from shira.store.header import FLOATS, WHOLE_DTYPES, open_tensors, refusing
from shira.store.json_text import parse_object, shape_in
from shira.support import Support

_INDICES = ".indices"
_LIMIT = 2**31  # entries that int32 indices can count


class SparsePatch(NamedTuple):
    """Replacement values for some entries of one weight; the fields are vLLM's.

    Attributes:
        name: The weight's name in the checkpoint.
        indices: int32 ``(k,)``, increasing flat indices into the weight.
        values: ``(k,)`` what stands there afterwards, in the weight's dtype.
        full_shape: The weight's whole shape.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def to_patches(
    adapter: Adapter, base: Model, *, scale: float = 1.0, check_base: bool = True
) -> list[SparsePatch]:
    """Make patches of a base from an adapter.

    Args:
        adapter: The adapter.
        base: The base: a safetensors checkpoint's path, a module, or a state dict. Its names are
            those of the patches.
        scale: Factor on the deltas.
        check_base: Refuse a base that is not the adapter's, as far as its fingerprint can tell.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        FileFormatError: If the checkpoint is damaged.
        WrongBaseError: If the base lacks a parameter, has it in another shape, or is another one.
        MergeError: If a weight is tied to another, which a patch would change too.
        AdapterError: If the scale is not a finite number, int32 cannot count the entries of a
            weight, or the adapter has whole tensors, which are no patches.

    Example:
        >>> delta = SparseDelta(Support((2, 3), torch.tensor([0, 4])), torch.tensor([1.0, 2.0]))
        >>> (patch,) = shira.convert.to_patches(Adapter({"w": delta}), {"w": torch.ones(2, 3)})
        >>> patch.indices.tolist(), patch.values.tolist()
        ([0, 4], [2.0, 3.0])
    """
    adapter.require_sparse("sparse weight patches")
    scale = checked_scale("the adapter", scale)
    source = source_of(base, list(adapter), all_names=True)
    keys = names_in(source, list(adapter), "adapter")
    source.check_untied(keys.values())
    verdicts: dict[str, Verdict] = {}
    pieces: dict[str, list[tuple[Tensor, Tensor, tuple[int, ...]]]] = {}
    for name, delta in adapter.items():
        key = keys[name]
        support = delta.support.to("cpu")
        if source.shapes[key] != support.shape:
            raise WrongBaseError(
                f"{source.label}: {key!r} has shape {source.shapes[key]}, but the adapter was made "
                f"for {support.shape}"
            )
        before = source.entries(key, support.indices)
        verdicts[name] = judge(adapter.metadata, name, delta.values, before)
        new = SparseDelta(support, delta.values.cpu()).replacement(before, scale)
        for stored, here, at in source.split(key, support.indices):
            if math.prod(stored.shape) >= _LIMIT:
                raise AdapterError(
                    f"{stored.key!r} has {math.prod(stored.shape)} entries, more than a patch's "
                    "int32 indices can count"
                )
            pieces.setdefault(stored.key, []).append((at, new[here], stored.shape))
    patches = [_patch(key, some) for key, some in pieces.items()]
    if check_base:
        accept(adapter.metadata, verdicts, source.label, "check_base=False, --no-check-base")
    return patches


def _patch(key: str, pieces: Sequence[tuple[Tensor, Tensor, tuple[int, ...]]]) -> SparsePatch:
    """Join the entries, values and shape of what lies in one tensor."""
    (flat, values, shape), *more = pieces
    if more:
        flat, order = torch.cat([flat, *(piece[0] for piece in more)]).sort()
        values = torch.cat([values, *(piece[1] for piece in more)])[order]
    return SparsePatch(key, Support(shape, flat).indices, values, shape)


def save_patches(patches: Iterable[SparsePatch], path: str | os.PathLike[str]) -> None:
    """Write a patch file, atomically."""
    entries = (
        Entries(p.name, list(p.full_shape), Support(p.full_shape, p.indices), p.values)
        for p in patches
    )
    write_entry_file(path, _PATCHES, entries)


def load_patches(path: str | os.PathLike[str]) -> list[SparsePatch]:
    """Read and check a patch file.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, or no patch file.
    """
    patches = []
    for name, _, support, values in read_entry_file(path, _PATCHES):
        if support.numel >= _LIMIT:
            raise FileFormatError(f"{path}: {name!r}: more entries than int32 indices can count")
        patches.append(SparsePatch(name, support.indices, values, support.shape))
    return patches


class Kind(NamedTuple):
    """One kind of file with some entries of each of several weights."""

    name: str  # its ``format``
    what: str  # in messages
    values: str  # the end of the name of a weight's values
    about: str  # the entry of the metadata that tells of each weight
    dtypes: Collection[str]  # of the values
    shape_of: Callable[[Any], tuple[int, ...]]  # of what is told; ValueError if there is none


class Entries(NamedTuple):
    """Some entries of one weight, with what is told of it, and ``(k,)`` values."""

    name: str
    told: Any
    support: Support
    values: Tensor


def write_entry_file(
    path: str | os.PathLike[str], kind: Kind, all_entries: Iterable[Entries]
) -> None:
    """Write a file of entries, atomically; its folder is made if absent."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, told, support, values in all_entries:
        tensors[name + _INDICES] = support.indices.contiguous()
        tensors[name + kind.values] = values.contiguous()
        about[name] = told
    metadata = {"format": kind.name, "version": "1", kind.about: json.dumps(about)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(tensors, metadata=metadata))


def read_entry_file(path: str | os.PathLike[str], kind: Kind) -> list[Entries]:
    """Read and check a file of entries."""
    with open_tensors(path) as file:
        told = file.metadata
        if told.get("format") != kind.name:
            raise FileFormatError(f"{file.path}: not {kind.what}")
        if told.get("version") != "1":
            raise FileFormatError(
                f"{file.path}: version {told.get('version')!r} of such files ({kind.name}) is "
                "not known, only '1'; update shira"
            )
        about = parse_object(told.get(kind.about, ""), file.path, kind.about)
        wanted = {name + part for name in about for part in (_INDICES, kind.values)}
        if wanted != set(file.tensors):
            odd = sorted(wanted ^ set(file.tensors))[0]
            raise FileFormatError(f"{file.path}: tensor {odd!r} is missing or not listed")
        found = []
        for name, of_weight in about.items():
            with refusing(file.path, repr(name)):
                shape = kind.shape_of(of_weight)
                if file.tensors[name + kind.values].dtype not in kind.dtypes:
                    raise ValueError(f"{kind.values[1:]} are {', '.join(kind.dtypes)}")
                indices = file.read(name + _INDICES)
                support = Support(shape, indices)
                if indices.dtype != support.indices.dtype:
                    wanted_dtype = str(support.indices.dtype).removeprefix("torch.")
                    raise ValueError(f"indices are {wanted_dtype}")
                values = file.read(name + kind.values)
                if values.shape != (support.nnz,):
                    raise ValueError(
                        f"{support.nnz} indices need {kind.values[1:]} of shape ({support.nnz},), "
                        f"not {tuple(values.shape)}"
                    )
            found.append(Entries(name, of_weight, support, values))
    return found


_PATCHES = Kind(
    *("shira-sparse-patch", "a file of sparse weight patches", ".values", "shapes"),
    FLOATS,
    shape_in,
)


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
    target = check_output(checkpoint.path.is_dir(), output, overwrite)
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
