# SPDX-License-Identifier: Apache-2.0
"""`Route`: the worker's side of `shira.serve.value_sender`, k new values into an adapter's entries.

Imports no engine; ``shira.serve.vllm_transfer`` makes one in each worker of vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from shira.delta import SparseDelta
from shira.errors import AdapterError
from shira.serve.loading import LoadedAdapter, in_order
from shira.serve.messages import agree
from shira.serve.placement import Storage
from shira.serve.value_sender import FixedSupport, check_finite
from shira.serve.worker import WorkerAdapters
from shira.switch.weights import make_patch


class Route:
    """The way of new values for an adapter to one worker's storages; the positions stay.

    Made once: for each storage, which of the k values go there, in the order in which the worker
    keeps them. An update switches the weights as any activation does, from the originals that were
    kept, so that nothing drifts however many updates there are.

    Args:
        worker: The worker's adapters.
        name: Of the one that is updated; it is loaded already.
        read: Reads an adapter with its positions, as `WorkerAdapters.load`.
        digest: Of the sender's positions, which must be those that are read and those that the
            worker keeps (else `AdapterError`); see `FixedSupport.digest`.
    """

    def __init__(
        self,
        worker: WorkerAdapters,
        name: str,
        read: Callable[[], Mapping[str, SparseDelta]],
        digest: str,
    ) -> None:
        self.worker, self.name = worker, name
        self.nnz = 0
        self._key = digest.encode()[:64]
        loaded = worker.require(name)
        self._order = agree(worker.processes, lambda: self._ordered(loaded, read(), digest))
        """The worker's offsets in each storage, and which of the k values go there."""
        worker.pin(name)  # its file has other values than those that come

    def update(self, values: Tensor) -> None:
        """Exchange the adapter's ``(k,)`` values, in the weights too if it is active, or nothing.

        Errors are those of `WorkerAdapters.activate`, and `AdapterError` if there are not k of
        them, or one is not finite.
        """
        loaded = self.worker.require(self.name)
        after = agree(self.worker.processes, lambda: self._exchanged(loaded, values))
        self.worker.exchange(self.name, after)

    def _ordered(
        self, loaded: LoadedAdapter, adapter: Mapping[str, SparseDelta], digest: str
    ) -> dict[Storage, tuple[Tensor, Tensor]]:
        fixed = FixedSupport.of(adapter)
        if fixed.digest != digest:
            raise AdapterError(
                f"the sender's positions of adapter {self.name!r} have the hash {digest}, those "
                f"at the path {fixed.digest}: save the adapter that is trained"
            )
        self.nnz = fixed.nnz
        counts = accumulate((support.nnz for support in fixed.supports.values()), initial=0)
        first = dict(zip(fixed.supports, counts, strict=False))
        pieces = {name: self.worker.locate(name, each) for name, each in fixed.supports.items()}
        order = {}
        for storage, parts, positions, by in in_order(pieces):
            entry = loaded.entries.get(storage)
            if entry is None or not torch.equal(positions, entry.patch.offsets.cpu().long()):
                break
            entries = torch.cat([piece.entries + first[name] for name, piece in parts])
            order[storage] = entry.patch.offsets, entries[by]
        else:
            if order.keys() == loaded.entries.keys() and fixed.nnz == loaded.nnz:
                return order
        raise AdapterError(
            f"adapter {self.name!r} was loaded with other positions than those at the path"
        )

    def _exchanged(self, loaded: LoadedAdapter, values: Tensor) -> LoadedAdapter:
        """Return the adapter with other values; nothing is written."""
        if values.shape != (self.nnz,) or not values.is_floating_point():
            raise AdapterError(
                f"adapter {self.name!r} has {self.nnz} values, not "
                f"{tuple(values.shape)} of {values.dtype}"
            )
        check_finite(values, f"adapter {self.name!r} that were sent")
        entries = {}
        for storage, entry in loaded.entries.items():
            old = entry.patch
            offsets, order = self._order.get(storage, (None, None))
            if old.offsets is not offsets:
                raise AdapterError(
                    f"adapter {self.name!r} was loaded anew since the positions were agreed on"
                )
            new = values[order].to(storage.weight.device)
            patch = make_patch(old.offsets, old.originals, new)
            entries[storage] = entry._replace(values=new, patch=patch)
        raw = values.detach().contiguous().view(torch.uint8).numpy().data
        digest = hashlib.blake2b(raw, digest_size=16, key=self._key).hexdigest()
        return loaded._replace(entries=entries, digest=digest)
