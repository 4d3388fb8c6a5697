# SPDX-License-Identifier: Apache-2.0
"""Adapters as sparse weight patches: what stands in the place of the base's values, and where.

The coordinates are those of vLLM's own ``SparseWeightPatch`` (vllm.distributed.weight_transfer):
the checkpoint's name of a weight, int32 flat indices, replacement values in the weight's dtype, the
whole shape. A patch needs no base to be applied, and so knows neither scale nor delta.

A patch file is a safetensors file with ``<name>.indices`` ``(k,)`` I32 and ``<name>.values``
``(k,)`` for each weight, in the weight's dtype. Its ``__metadata__``: ``format`` is
``"shira-sparse-patch"``, ``version`` is ``"1"``, ``shapes`` is JSON, ``{name: [sizes]}``. An undo
file is written and read by the same functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.adapter import Adapter
from shira.base import accept, judge
from shira.checkpoints.models import Model, names_in, source_of
from shira.delta import SparseDelta, checked_scale
from shira.errors import AdapterError, FileFormatError, WrongBaseError
from shira.store.atomic import write_atomically
from shira.store.header import FLOATS, open_tensors, refusing
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
    source = source_of(base, all_names=True)
    keys = names_in(source, list(adapter), "adapter")
    source.check_untied(keys.values())
    patches, verdicts = [], {}
    for name, delta in adapter.items():
        key = keys[name]
        support = delta.support.to("cpu")
        if source.shapes[key] != support.shape:
            raise WrongBaseError(
                f"{source.label}: {key!r} has shape {source.shapes[key]}, but the adapter was made "
                f"for {support.shape}"
            )
        if support.numel >= _LIMIT:
            raise AdapterError(
                f"{name!r} has {support.numel} entries, more than a patch's int32 indices can count"
            )
        before = source.entries(key, support.indices)
        verdicts[name] = judge(adapter.metadata, name, delta.values, before)
        new = SparseDelta(support, delta.values.cpu()).replacement(before, scale)
        patches.append(SparsePatch(key, support.indices, new, support.shape))
    if check_base:
        accept(adapter.metadata, verdicts, source.label, "check_base=False, --no-check-base")
    return patches


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
