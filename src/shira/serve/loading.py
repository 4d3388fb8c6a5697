# SPDX-License-Identifier: Apache-2.0
"""From an adapter to what this rank changes: place it, check that all of it has a place.

Every rank reads the whole adapter and keeps the entries that live on it. Together the ranks must
have a place for each entry; some base values there must be the checkpoint's, where it is at hand;
and all of them must have the fingerprint that the adapter records, where it does and where the
dtype in which the model is served can tell. No weight is written here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shira.delta import Adapter, SparseDelta, fingerprint
from shira.errors import AdapterError, PlacementError, WrongBaseError
from shira.serve.exchange import Part, same_bits
from shira.serve.placement import Placement
from shira.serve.ranks import Ranks, agree, gather
from shira.support import Support

FINGERPRINTS = "base_fingerprint"
"""Where an adapter's metadata keeps ``{parameter name: fingerprint of the base values}``."""

_SOME = 256  # entries of each part of a weight compared with the checkpoint's

_NARROWER: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.bfloat16, torch.float16)
}
_NARROWER[torch.float64] = (torch.float32, *_NARROWER[torch.float32])

Place = Callable[[str, tuple[int, ...]], tuple[Placement, ...]]
"""Where this rank keeps the weight of that name and shape."""

Stored = Callable[[str, Tensor], "Tensor | None"]
"""Values of a checkpoint's weight at flat indices, to compare some with; None if not at hand."""

Originals = Callable[[Tensor, Tensor], Tensor]
"""The base's values at int64 positions of a storage, whatever is active."""


class Loaded(NamedTuple):
    """An adapter as one rank holds it.

    Attributes:
        parts: By storage.
        digest: Hash of the whole adapter: names, shapes, positions, values.
        nnz: Entries of the whole adapter.
        parameters: How many weights the whole adapter changes.
        checked: For how many of them the base's fingerprint was compared.
    """

    parts: Mapping[int, Part]
    digest: str
    nnz: int
    parameters: int
    checked: int

    @property
    def nnz_here(self) -> int:
        """Entries on this rank."""
        return sum(part.delta.nnz for part in self.parts.values())


class _Found(NamedTuple):
    """The entries of one parameter that live on this rank, part by part."""

    pieces: list[tuple[Placement, Tensor, Tensor]]

    @property
    def entries(self) -> int:
        """How many different entries."""
        if not self.pieces:
            return 0
        return int(torch.unique(torch.cat([entries for _, entries, _ in self.pieces])).numel())


def load(
    read: Callable[[], Adapter],
    place: Place,
    originals: Originals,
    ranks: Ranks,
    stored: Stored = lambda name, indices: None,
) -> Loaded:
    """What this rank keeps of an adapter; every rank calls it for the same one.

    Args:
        read: Reads and validates the adapter.
        place: From `shira.serve.placement.trace`.
        originals: To compare the base by.
        ranks: All that hold a part of the model.
        stored: What the checkpoint has, of which some entries of each weight are compared.

    Raises:
        FileNotFoundError: If there is no adapter.
        FileFormatError: If it is damaged.
        PlacementError: If a weight cannot be placed entry by entry, or an entry has no place.
        AdapterError: If two of its weights are one, or ranks read different adapters.
        WrongBaseError: If it was made for another base.
    """
    adapter, found, parts = agree(ranks, lambda: _placed(read(), place))
    agree(ranks, lambda: _check_layout(adapter, found, originals, stored))
    digest = digest_of(adapter)
    everyone = gather(ranks, (digest, [each.entries for each in found.values()]))
    agree(ranks, lambda: _check_same(ranks, [other for other, _ in everyone]))
    counts = [counts for _, counts in everyone]
    values: dict[str, list[Any]] = {}
    for at, (name, each) in enumerate(found.items()):
        if all(of_rank[at] < adapter[name].nnz for of_rank in counts):  # nobody has all of it
            values[name] = gather(ranks, _values(each, originals))
        elif each.entries == adapter[name].nnz:
            values[name] = [_values(each, originals)]
    recorded = adapter.metadata.get(FINGERPRINTS) or {}
    checked = agree(
        ranks,
        lambda: [
            name for name in values if _check(name, adapter[name], values[name], recorded.get(name))
        ],
    )
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


def _placed(adapter: Adapter, place: Place) -> tuple[Adapter, dict[str, _Found], dict[int, Part]]:
    found: dict[str, _Found] = {}
    by_storage: dict[int, list[tuple[str, Tensor, Tensor, Tensor]]] = {}
    for name, delta in adapter.items():
        pieces = []
        for placement in place(name, delta.support.shape):
            entries, positions = placement.locate(delta.support.indices)
            pieces.append((placement, entries, positions))
            key = placement.storage.untyped_storage()._cdata
            piece = (name, placement.storage, positions, delta.values[entries])
            by_storage.setdefault(key, []).append(piece)
        found[name] = _Found(pieces)
    return adapter, found, {key: _part(pieces) for key, pieces in by_storage.items()}


def _part(pieces: list[tuple[str, Tensor, Tensor, Tensor]]) -> Part:
    """The pieces of one storage as one delta; two entries at one position are refused."""
    storage = pieces[0][1]
    positions, order = torch.cat([positions for _, _, positions, _ in pieces]).sort()
    values = torch.cat([values for _, _, _, values in pieces])[order]
    if bool((positions[1:] == positions[:-1]).any()):
        names = " and ".join(dict.fromkeys(repr(name) for name, *_ in pieces))
        raise AdapterError(
            f"two entries of the adapter are one entry of the served model: {names} are kept as "
            "one weight (tied?). Adapt one of them"
        )
    support = Support._trusted((storage.numel(),), positions.to(storage.device))
    return Part(storage, SparseDelta(support, values.to(storage.device)))


def _check_same(ranks: Ranks, digests: list[str]) -> None:
    if digests[ranks.rank] != digests[0]:
        raise AdapterError("ranks read different adapters from one path; was the file replaced?")


def _values(found: _Found, originals: Originals) -> tuple[Tensor, Tensor]:
    """Entries that live here and the base's values at them, on the CPU."""
    entries = [torch.empty(0, dtype=torch.int64)]
    values = []
    for placement, which, positions in found.pieces:
        entries.append(which.cpu())
        values.append(originals(placement.storage, positions.to(placement.storage.device)).cpu())
    return torch.cat(entries), torch.cat(values) if values else torch.empty(0)


def _check_layout(
    adapter: Adapter, found: Mapping[str, _Found], originals: Originals, stored: Stored
) -> None:
    """Some base values are at the places where the loader's trace says they are."""
    for name, each in found.items():
        for placement, entries, positions in each.pieces:
            some = torch.arange(0, entries.numel(), max(1, entries.numel() // _SOME))
            expected = stored(name, adapter[name].support.indices[entries[some]])
            if expected is None:
                break
            held = originals(placement.storage, positions[some].to(placement.storage.device)).cpu()
            if not same_bits(held, expected.to(held.dtype)):
                raise PlacementError(
                    f"the model does not keep {name!r} as its checkpoint has it: other values "
                    "stand where its loader puts them (packed or shuffled for the engine's "
                    "kernels after loading, or not the weights of that checkpoint?)"
                )


def _check(name: str, delta: SparseDelta, pieces: list[Any], recorded: str | None) -> bool:
    """Whether the fingerprint was compared, and was right."""
    held = [(entries, values) for entries, values in pieces if entries.numel()]
    dtype = held[0][1].dtype if held else torch.float32
    base = torch.zeros(delta.nnz, dtype=dtype)
    placed = torch.zeros(delta.nnz, dtype=torch.bool)
    for entries, values in held:
        base[entries] = values
        placed[entries] = True
    if not bool(placed.all()):
        missing = delta.nnz - int(placed.sum())
        raise PlacementError(
            f"{missing} of the {delta.nnz} entries of {name!r} have no place in the served model: "
            f"its loader skips that weight, or keeps less of it than {delta.support.shape}"
        )
    if recorded is None:
        return False
    of = getattr(torch, recorded.partition(":")[0], None)
    if of != dtype and of not in _NARROWER.get(dtype, ()):
        return False  # served in fewer bits than it was made on: the hash cannot tell
    if fingerprint(base.to(of)) != recorded:
        raise WrongBaseError(
            f"made for another base model: at its entries, {name!r} has not the values on which "
            "the adapter was trained"
        )
    return True
