# SPDX-License-Identifier: Apache-2.0
"""Adapters as sparse weight patches: what stands in the place of the base's values, and where.

The coordinates are those of vLLM's own ``SparseWeightPatch`` (vllm.distributed.weight_transfer):
the checkpoint's name of a weight, int32 flat indices, replacement values in the weight's dtype, the
whole shape. A patch needs no base to be applied, and so knows neither scale nor delta.

A patch file is a safetensors file with ``<name>.indices`` ``(k,)`` I32 and ``<name>.values``
``(k,)`` for each weight, in the weight's dtype. Its ``__metadata__``: ``format`` is
``"shira-sparse-patch"``, ``version`` is ``"1"``, ``shapes`` is JSON, ``{name: [sizes]}``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from shira.adapter import Adapter
from shira.base import accept, judge
from shira.checkpoints.naming import match_names
from shira.checkpoints.opening import FLOATS
from shira.checkpoints.sources import Model, source_of
from shira.convert.entry_file import Entries, Kind, read, sizes, write
from shira.delta import SparseDelta, checked_scale
from shira.errors import AdapterError, FileFormatError, WrongBaseError, did_you_mean
from shira.support import Support

_LIMIT = 2**31
_FILE = Kind(
    "shira-sparse-patch", "1", "a file of sparse weight patches", ".values", "shapes", FLOATS, sizes
)


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
    """An adapter as patches of a base.

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
    """
    adapter.require_sparse("sparse weight patches")
    scale = checked_scale("the adapter", scale)
    source = source_of(base, shared=True)
    if not len(adapter):
        return []
    prefix = match_names(list(adapter), source.shapes)
    if prefix is None:
        odd = next(name for name in adapter if name not in source.shapes)
        packed = f" (it has one of {source.others[odd]})" if odd in source.others else ""
        raise WrongBaseError(
            f"{source.label}: there is no {odd!r} of floating point{packed}, which the adapter "
            f"changes; is this its base?{did_you_mean(odd, source.shapes)}"
        )
    source.check_untied(prefix.apply(name) or name for name in adapter)
    patches, verdicts = [], {}
    for name, delta in adapter.items():
        key = prefix.apply(name) or name
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
        held = source.entries(key, support.indices)
        verdicts[name] = judge(adapter.metadata, name, delta.values, held)
        new = SparseDelta(support, delta.values.cpu()).replacement(held, scale)
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
    write(path, _FILE, entries)


def load_patches(path: str | os.PathLike[str]) -> list[SparsePatch]:
    """Read and check a patch file.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, or no patch file.
    """
    patches = []
    for name, _, support, values in read(path, _FILE):
        if support.numel >= _LIMIT:
            raise FileFormatError(f"{path}: {name!r}: more entries than int32 indices can count")
        patches.append(SparsePatch(name, support.indices, values, support.shape))
    return patches
