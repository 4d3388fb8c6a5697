# SPDX-License-Identifier: Apache-2.0
"""From an adapter to what this process changes: read it, place it, check it. Writes no weight.

Every process reads the whole adapter and keeps the entries that live in it. Before any of them does
so they find out together whether it is this model's adapter, and whether its entries lie where the
loader's trace says: there must be a place for each entry; some base values there must be the
checkpoint's, where it is at hand; and all of them together must be those of the adapter's base, as
`shira.base.judge` finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.base import accept, judge
from shira.delta import SparseDelta
from shira.errors import AdapterError, PlacementError, SwitchError
from shira.ops.patch import base_at, same_bits
from shira.serve.messages import Processes, agree, gather
from shira.serve.placement import Storage
from shira.support import Support, align_indices
from shira.switch.weights import Entry, Plan, make_entry

StoredValues = Callable[[str, Tensor], "Tensor | None"]
"""Values of a checkpoint's weight at flat indices, to compare some with; None if not at hand."""

Steady = Callable[[], AbstractContextManager[Plan[Storage]]]
"""Keeps switches out of the weights inside a context, and gives what is in them."""

_SOME = 256  # entries of each part of a weight compared with the checkpoint's
_REMEDY = "save it without base_fingerprint in its metadata"


class LoadedAdapter(NamedTuple):
    """An adapter as one process holds it."""

    entries: Mapping[Storage, Entry]  # its part of the adapter; all that follows is of the whole
    digest: str  # of names, shapes, positions, values
    nnz: int
    parameters: int
    checked: int  # parameters known to have the base that the adapter was made on
    nbytes: int  # what its entries take in the process that has most of them
    nnz_here: int  # entries in this process
    base: str | None  # hash of the base's values at them; None: whatever they are now

    def with_entries(self, entries: Mapping[Storage, Entry], nbytes: int) -> LoadedAdapter:
        """Return the adapter with these entries, which take so many bytes where most of them are.

        Their base's values are the ones to be found when it is read again.
        """
        return self._replace(entries=entries, nbytes=nbytes, base=_base_hash(entries))

    def without_entries(self) -> LoadedAdapter:
        """Return what remains when the entries are dropped from memory."""
        return self._replace(entries={})


class Piece(NamedTuple):
    """The entries of a parameter that lie in one place."""

    storage: Storage
    entries: Tensor  # int64 (n,): which of the parameter's
    positions: Tensor  # int64 (n,): where in the storage

    def base(self, steady: Steady, some: slice = slice(None)) -> Tensor:
        """Return the base's values at some of the positions, whatever is active; on the CPU."""
        where = self.positions[some].to(self.storage.weight.device)
        with steady() as active:
            return base_at(self.storage.weight, where, active.get(self.storage)).cpu()


def load(
    read: Callable[[], Adapter],
    locate: Callable[[str, Support], list[Piece]],
    steady: Steady,
    processes: Processes,
    stored: StoredValues | None,
) -> LoadedAdapter:
    """Return what this process keeps of an adapter; every process calls it for the same one.

    Errors are those of ``read``, and `AdapterError` (`PlacementError`, `WrongBaseError`) for one
    that does not fit the model.
    """

    def place_it() -> tuple[Adapter, str, dict[str, list[Piece]], dict[Storage, Entry]]:
        adapter = read()
        adapter.require_sparse("a served model")
        pieces = {name: locate(name, delta.support) for name, delta in adapter.items()}
        entries = _entries_of(adapter, pieces, steady)
        if stored is not None:
            _check_layout(adapter, pieces, steady, stored)
        return adapter, digest_of(adapter), pieces, entries

    adapter, digest, pieces, entries = agree(processes, place_it)
    counts = {
        name: align_indices([piece.entries for piece in each])[0].numel() if each else 0
        for name, each in pieces.items()
    }
    everyone = gather(processes, (digest, counts))
    if len({other for other, _ in everyone}) != 1:
        raise AdapterError("ranks read different adapters from one path; was the file replaced?")
    values: dict[str, list[list[tuple[Tensor, Tensor]]]] = {}
    for name, each in pieces.items():
        nobody_has_all = all(theirs[name] < adapter[name].nnz for _, theirs in everyone)
        if nobody_has_all or counts[name] == adapter[name].nnz:
            here = [(piece.entries.cpu(), piece.base(steady)) for piece in each]
            values[name] = gather(processes, here) if nobody_has_all else [here]

    def check_base() -> list[str]:
        verdicts = {}
        for name, parts in values.items():
            base = _base_of(name, adapter[name], [part for each in parts for part in each])
            verdicts[name] = judge(adapter.metadata, name, adapter[name].values, base)
        # No warning: how many were found to be the base's is in the report.
        accept(adapter.metadata, verdicts, "the served model", _REMEDY, warn=False)
        return [name for name, verdict in verdicts.items() if verdict.startswith("same")]

    checked = agree(processes, check_base)
    everyone_checked = gather(processes, (checked, nbytes_of(entries)))
    names = {name for others, _ in everyone_checked for name in others}
    return LoadedAdapter(
        entries,
        digest,
        nnz=adapter.nnz,
        parameters=len(adapter),
        checked=len(names),
        nbytes=max(nbytes for _, nbytes in everyone_checked),
        nnz_here=sum(entry.patch.nnz for entry in entries.values()),
        base=_base_hash(entries),
    )


def load_again(
    before: LoadedAdapter,
    read: Callable[[], Adapter],
    locate: Callable[[str, Support], list[Piece]],
    steady: Steady,
    processes: Processes,
) -> LoadedAdapter:
    """Return an adapter that was dropped from memory; every process calls it for the same one.

    Errors are those of ``read``; `AdapterError` if that is another adapter than before, and
    `SwitchError` if the base has other values at its entries.
    """

    def place_it() -> dict[Storage, Entry]:
        adapter = read()
        if (now := digest_of(adapter)) != before.digest:
            raise AdapterError(f"it is another adapter now (digest {now}, then {before.digest})")
        pieces = {name: locate(name, delta.support) for name, delta in adapter.items()}
        entries = _entries_of(adapter, pieces, steady)
        if before.base not in (None, _base_hash(entries)):
            raise SwitchError(
                "the base's values at its entries are not those of when it was loaded (reloaded or "
                "trained on?). If the weights are a whole base again, rebase(check=False) takes "
                "them as they are"
            )
        return entries

    return before.with_entries(agree(processes, place_it), before.nbytes)


def nbytes_of(entries: Mapping[Storage, Entry]) -> int:
    """Return the bytes of an adapter's entries in this process.

    Each entry has an offset (int32; int64 in a storage of more than 2^31 entries), a value in the
    dtype of the adapter's file, and the base's and the adapter's entry in the weight's dtype.
    """
    return sum(
        tensor.numel() * tensor.element_size()
        for values, patch in entries.values()
        for tensor in (values, patch.offsets, patch.originals, patch.replacement)
        if tensor is not None
    )


def in_order(
    pieces: Mapping[str, Sequence[Piece]],
) -> Iterator[tuple[Storage, list[tuple[str, Piece]], Tensor, Tensor]]:
    """Yield each storage, the pieces in it, their positions sorted, and the order that sorts."""
    by_storage: dict[Storage, list[tuple[str, Piece]]] = {}
    for name, each in pieces.items():
        for piece in each:
            by_storage.setdefault(piece.storage, []).append((name, piece))
    for storage, parts in by_storage.items():
        positions, order = torch.cat([piece.positions for _, piece in parts]).sort()
        yield storage, parts, positions, order


def entry_at(storage: Storage, positions: Tensor, values: Tensor, active: Plan[Storage]) -> Entry:
    """Return the entry of ``(k,)`` deltas at ascending positions of a storage; as `make_entry`."""
    weight = storage.weight
    support = Support._trusted((weight.numel(),), positions.to(weight.device))
    delta = SparseDelta(support, values.to(weight.device))
    return make_entry(delta, weight, active.get(storage))[0]


def digest_of(adapter: Adapter) -> str:
    """Return a hash of all that an adapter does: ``blake2b`` in 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(adapter):
        support, values = adapter[name].support, adapter[name].values
        digest.update(f"{name} {support.shape} {values.dtype} {support.nnz}\n".encode())
        for tensor in (support.indices.to(torch.int64), values):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base_hash(entries: Mapping[Storage, Entry]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for storage in sorted(entries, key=lambda storage: storage.name):
        originals = entries[storage].patch.originals
        digest.update(f"{storage.name} {originals.dtype} {originals.numel()}\n".encode())
        digest.update(originals.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _entries_of(
    adapter: Adapter, pieces: Mapping[str, Sequence[Piece]], steady: Steady
) -> dict[Storage, Entry]:
    """Join what lies in one storage; two entries at one position are refused."""
    joined = {}
    for storage, parts, positions, order in in_order(pieces):
        values = torch.cat([adapter[name].values[piece.entries] for name, piece in parts])[order]
        if bool((positions[1:] == positions[:-1]).any()):
            names = " and ".join(dict.fromkeys(repr(name) for name, _ in parts))
            raise AdapterError(
                f"two entries of the adapter are one entry of the served model: {names} are kept "
                "as one weight (tied?). Adapt one of them"
            )
        with steady() as active:
            joined[storage] = entry_at(storage, positions, values, active)
    return joined


def _check_layout(
    adapter: Adapter, pieces: Mapping[str, list[Piece]], steady: Steady, stored: StoredValues
) -> None:
    """Compare some base values with the checkpoint's.

    An engine may lay weights out anew after loading (packed for its kernels, experts shuffled) in
    memory of the same shape and dtype; then nothing but the values can tell.
    """
    for name, each in pieces.items():
        for piece in each:
            some = slice(None, None, max(1, piece.entries.numel() // _SOME))
            expected = stored(name, adapter[name].support.indices[piece.entries[some]])
            if expected is None:
                break
            found = piece.base(steady, some)
            if not same_bits(found, expected.to(found.dtype)):
                raise PlacementError(
                    f"the model does not keep {name!r} as its checkpoint has it: other values "
                    "stand where its loader puts them (packed or shuffled for the engine's "
                    "kernels after loading, or not the weights of that checkpoint?)"
                )


def _base_of(name: str, delta: SparseDelta, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ``(k,)`` base values of a parameter; `PlacementError` if an entry has no place."""
    found = [(entries, values) for entries, values in parts if entries.numel()]
    base = torch.zeros(delta.nnz, dtype=found[0][1].dtype if found else torch.float32)
    placed = torch.zeros(delta.nnz, dtype=torch.bool)
    for entries, values in found:
        base[entries] = values
        placed[entries] = True
    missing = delta.nnz - int(placed.sum())
    if missing:
        raise PlacementError(
            f"{missing} of the {delta.nnz} entries of {name!r} have no place in the served model: "
            f"its loader skips that weight, or keeps less of it than {delta.support.shape}"
        )
    return base
