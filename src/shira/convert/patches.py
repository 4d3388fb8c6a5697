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

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.convert.base_check import check_values
from shira.convert.checkpoint import FLOATS
from shira.convert.naming import match_names
from shira.convert.sources import Model, source_of
from shira.delta import Adapter, SparseDelta
from shira.errors import AdapterError, FileFormatError, ShiraError, WrongBaseError, did_you_mean
from shira.store.atomic import write_atomically
from shira.store.json_text import parse_object
from shira.store.safetensors_header import open_regular, read_header, read_tensor
from shira.support import Support

FORMAT = "shira-sparse-patch"
VERSION = "1"
INDICES, VALUES = ".indices", ".values"
_LIMIT = 2**31


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
        AdapterError: If int32 cannot count the entries of a weight.
    """
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
    patches = []
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
        check_values(adapter.metadata, name, delta, held, f"{source.label}: {key!r}", check_base)
        new = SparseDelta(support, delta.values.cpu()).replacement(held, scale)
        patches.append(SparsePatch(key, support.indices, new, support.shape))
    return patches


def save_patches(patches: Iterable[SparsePatch], path: str | os.PathLike[str]) -> None:
    """Write a patch file, atomically."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for patch in patches:
        tensors[patch.name + INDICES] = patch.indices.contiguous()
        tensors[patch.name + VALUES] = patch.values.contiguous()
        shapes[patch.name] = list(patch.full_shape)
    metadata = {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(tensors, metadata=metadata))


def load_patches(path: str | os.PathLike[str]) -> list[SparsePatch]:
    """Read and check a patch file.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, or no patch file.
    """
    with open_regular(path) as file:
        header = read_header(file, path)
        if header.metadata.get("format") != FORMAT:
            raise FileFormatError(f"{header.path}: not a file of sparse weight patches")
        if header.metadata.get("version") != VERSION:
            raise FileFormatError(
                f"{header.path}: version {header.metadata.get('version')!r} of patch files is not "
                f"known (this is {VERSION!r}); update shira"
            )
        shapes = parse_object(header.metadata.get("shapes", "").encode(), header.path, "shapes")
        wanted = {name + part for name in shapes for part in (INDICES, VALUES)}
        if wanted != set(header.tensors):
            odd = sorted(wanted ^ set(header.tensors))[0]
            raise FileFormatError(f"{header.path}: tensor {odd!r} is missing or not listed")
        patches = []
        for name, shape in shapes.items():
            try:
                if not isinstance(shape, list) or not all(type(n) is int for n in shape):
                    raise FileFormatError("a shape is a list of sizes")
                if header.tensors[name + VALUES].dtype not in FLOATS:
                    raise FileFormatError("values are floating point")
                if header.tensors[name + INDICES].dtype != "I32":
                    raise FileFormatError("indices are int32")
                support = Support(shape, read_tensor(file, header, name + INDICES))
                values = SparseDelta(support, read_tensor(file, header, name + VALUES)).values
            except ShiraError as error:
                raise FileFormatError(f"{header.path}: {name!r}: {error}") from error
            patches.append(SparsePatch(name, support.indices, values, support.shape))
    return patches
