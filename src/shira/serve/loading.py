# SPDX-License-Identifier: Apache-2.0
"""From an adapter to what this rank changes: read it, place it, check it. Writes no weight.

Every rank reads the whole adapter and keeps the entries that live on it; ``checking`` is what the
ranks find out together before any of them keeps it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import accept, judge
from shira.errors import AdapterError
from shira.ops.patch import Patch
from shira.serve.checking import (
    Active,
    Found,
    Stored,
    base_of,
    check_layout,
    nothing_stored,
    values_of,
)
from shira.serve.exchange import Part, make_part
from shira.serve.placement import Placement
from shira.serve.ranks import Ranks, agree, gather

_REMEDY = "save it without base_fingerprint in its metadata"

Place = Callable[[str, tuple[int, ...]], tuple[Placement, ...]]
"""Where this rank keeps the weight of that name and shape."""


class Loaded(NamedTuple):
    """An adapter as one rank holds it.

    Attributes:
        parts: By storage.
        digest: Hash of the whole adapter: names, shapes, positions, values.
        nnz: Entries of the whole adapter.
        parameters: How many weights the whole adapter changes.
        checked: How many of them are known to have the base that the adapter was made on.
    """

    parts: Mapping[int, Part]
    digest: str
    nnz: int
    parameters: int
    checked: int

    @property
    def nnz_here(self) -> int:
        """Entries on this rank."""
        return sum(part.nnz for part in self.parts.values())


def load(
    read: Callable[[], Adapter],
    place: Place,
    active: Active,
    ranks: Ranks,
    stored: Stored = nothing_stored,
) -> Loaded:
    """What this rank keeps of an adapter; every rank calls it for the same one.

    Args:
        read: Reads and validates the adapter.
        place: From `shira.serve.placement.trace`.
        active: What is in the weights now.
        ranks: All that hold a part of the model.
        stored: What the checkpoint has, of which some entries of each weight are compared.

    Raises:
        FileNotFoundError: If there is no adapter.
        FileFormatError: If it is damaged.
        PlacementError: If a weight cannot be placed entry by entry, or an entry has no place.
        AdapterError: If it has whole tensors, two of its weights are one, or ranks read different
            adapters.
        WrongBaseError: If it was made for another base.
    """

    def place_it() -> tuple[Adapter, str, dict[str, Found], dict[int, Part]]:
        adapter = read()
        adapter.require_sparse("a served model")
        found, parts = _placed(adapter, place, active)
        check_layout(adapter, found, active, stored)
        return adapter, digest_of(adapter), found, parts

    adapter, digest, found, parts = agree(ranks, place_it)
    everyone = gather(ranks, (digest, [each.count for each in found.values()]))
    agree(ranks, lambda: _check_same([other for other, _ in everyone]))
    values: dict[str, list[Any]] = {}
    for at, (name, each) in enumerate(found.items()):
        if all(counts[at] < adapter[name].nnz for _, counts in everyone):  # nobody has all of it
            values[name] = gather(ranks, values_of(each, active))
        elif each.count == adapter[name].nnz:
            values[name] = [values_of(each, active)]

    def check_it() -> list[str]:
        verdicts = {
            n: judge(adapter.metadata, n, adapter[n].values, base_of(n, adapter[n], held))
            for n, held in values.items()
        }
        # No warning: how many were found to be the base's is in the report.
        accept(adapter.metadata, verdicts, "the served model", _REMEDY, warn=False)
        return [name for name, verdict in verdicts.items() if verdict.startswith("same")]

    checked = agree(ranks, check_it)
    names = {name for others in gather(ranks, checked) for name in others}
    return Loaded(parts, digest, adapter.nnz, len(adapter), len(names))


def digest_of(adapter: Adapter) -> str:
    """A hash of all that an adapter does: ``blake2b`` in 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(adapter):
        support, values = adapter[name].support, adapter[name].values
        digest.update(f"{name} {support.shape} {values.dtype} {support.nnz}\n".encode())
        for tensor in (support.indices.to(torch.int64), values):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _placed(
    adapter: Adapter, place: Place, active: Active
) -> tuple[dict[str, Found], dict[int, Part]]:
    found: dict[str, Found] = {}
    by_storage: dict[int, list[tuple[str, Tensor, Tensor, Tensor]]] = {}
    for name, delta in adapter.items():
        pieces = []
        for placement in place(name, delta.support.shape):
            entries, positions = placement.locate(delta.support.indices)
            pieces.append((placement, entries, positions))
            piece = (name, placement.storage, positions, delta.values[entries])
            by_storage.setdefault(placement.key, []).append(piece)
        found[name] = Found(pieces)
    return found, {key: _part(pieces, active.get(key)) for key, pieces in by_storage.items()}


def _part(pieces: list[tuple[str, Tensor, Tensor, Tensor]], active: Patch | None) -> Part:
    """The pieces of one storage as one; two entries at one position are refused."""
    positions, order = torch.cat([positions for _, _, positions, _ in pieces]).sort()
    values = torch.cat([values for _, _, _, values in pieces])[order]
    if bool((positions[1:] == positions[:-1]).any()):
        names = " and ".join(dict.fromkeys(repr(name) for name, *_ in pieces))
        raise AdapterError(
            f"two entries of the adapter are one entry of the served model: {names} are kept as "
            "one weight (tied?). Adapt one of them"
        )
    return make_part(pieces[0][1], positions, values, active)


def _check_same(digests: list[str]) -> None:
    if len(set(digests)) != 1:
        raise AdapterError("ranks read different adapters from one path; was the file replaced?")
