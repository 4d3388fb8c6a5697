# SPDX-License-Identifier: Apache-2.0
"""What undo files and patch files share: some entries of each of several weights, in safetensors.

``<name>.indices`` ``(k,)`` and ``<name>.<values>`` ``(k,)`` for each weight; in ``__metadata__``
what file it is, its version, and as JSON what is told of each weight. ``undo`` and ``patches`` say
what that is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.errors import FileFormatError, ShiraError
from shira.store.atomic import write_atomically
from shira.store.header import Header, read_header, read_tensor
from shira.store.json_text import open_regular, parse_object, shape_in
from shira.support import Support

INDICES = ".indices"


class Kind(NamedTuple):
    """One kind of file.

    Attributes:
        name: What ``format`` says in it.
        version: What ``version`` says.
        what: What such files are called in messages.
        values: What the values of a weight are called in it: ``".values"``.
        about: The entry of the metadata that tells of each weight.
        dtypes: What the values may be.
        shape_of: The weight's shape, of what is told of it; `FileFormatError` if there is none.
    """

    name: str
    version: str
    what: str
    values: str
    about: str
    dtypes: Collection[str]
    shape_of: Callable[[Any], list[int]]


class Entries(NamedTuple):
    """Some entries of one weight: its name, what is told of it, where they are and what is there.

    ``values`` are ``(k,)``.
    """

    name: str
    told: Any
    support: Support
    values: Tensor


def write(path: str | os.PathLike[str], kind: Kind, all_entries: Iterable[Entries]) -> None:
    """Write a file, atomically; its folder is made if absent."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, told, support, values in all_entries:
        tensors[name + INDICES] = support.indices.contiguous()
        tensors[name + kind.values] = values.contiguous()
        about[name] = told
    metadata = {"format": kind.name, "version": kind.version, kind.about: json.dumps(about)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(tensors, metadata=metadata))


def read(path: str | os.PathLike[str], kind: Kind) -> list[Entries]:
    """Read and check a file.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, or of another kind.
    """
    with open_regular(path) as file:
        header = read_header(file, path)
        about = _about(header, kind)
        wanted = {name + part for name in about for part in (INDICES, kind.values)}
        if wanted != set(header.tensors):
            odd = sorted(wanted ^ set(header.tensors))[0]
            raise FileFormatError(f"{header.path}: tensor {odd!r} is missing or not listed")
        found = []
        for name, told in about.items():
            try:
                shape = kind.shape_of(told)
                if header.tensors[name + kind.values].dtype not in kind.dtypes:
                    raise FileFormatError(f"{kind.values[1:]} are {', '.join(kind.dtypes)}")
                indices = read_tensor(file, header, name + INDICES)
                support = Support(shape, indices)
                if indices.dtype != support.indices.dtype:
                    wanted_dtype = str(support.indices.dtype).removeprefix("torch.")
                    raise FileFormatError(f"indices are {wanted_dtype}")
                values = read_tensor(file, header, name + kind.values)
                if values.shape != (support.nnz,):
                    raise FileFormatError(
                        f"{support.nnz} indices need {kind.values[1:]} of shape ({support.nnz},), "
                        f"not {tuple(values.shape)}"
                    )
            except ShiraError as error:
                raise FileFormatError(f"{header.path}: {name!r}: {error}") from error
            found.append(Entries(name, told, support, values))
    return found


def sizes(told: object) -> list[int]:
    """A shape as JSON has it.

    Raises:
        FileFormatError: If it is none.
    """
    try:
        return list(shape_in(told))
    except ValueError as error:
        raise FileFormatError(str(error)) from error


def _about(header: Header, kind: Kind) -> Mapping[str, Any]:
    told = header.metadata
    if told.get("format") != kind.name:
        raise FileFormatError(f"{header.path}: not {kind.what}")
    if told.get("version") != kind.version:
        raise FileFormatError(
            f"{header.path}: version {told.get('version')!r} of such files ({kind.name}) is not "
            f"known, only {kind.version!r}; update shira"
        )
    return parse_object(told.get(kind.about, ""), header.path, kind.about)
