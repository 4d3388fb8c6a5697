# SPDX-License-Identifier: Apache-2.0
"""New values for an adapter that a rank holds: the positions stay, O(k), exact.

`Route` is made once: for each storage of the rank, which of the k values go there, in the order in
which `Held` keeps them. An update exchanges the values; if the adapter is active the weights are
switched to the new ones as by any activation, from the originals that were kept, so nothing drifts
however many updates there are. Sits above ``held``; every rank calls the same in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shira.delta import SparseDelta
from shira.errors import AdapterError, UnknownAdapterError, did_you_mean
from shira.serve.exchange import Part
from shira.serve.fixed_support import FixedSupport, check_finite
from shira.serve.held import Held
from shira.serve.loading import Loaded
from shira.serve.ranks import agree


class Route:
    """How values of a fixed support reach one rank's storages.

    Args:
        held: The rank's adapters.
        name: Of the one that is updated; it is loaded already.
        read: Reads an adapter with its positions, as `Held.load`.
        digest: The hash of the positions that the sender has; see `FixedSupport.digest`.

    Raises:
        UnknownAdapterError: If no such adapter is held.
        AdapterError: If the positions read, the sender's, and those held are not the same.
    """

    def __init__(
        self, held: Held, name: str, read: Callable[[], Mapping[str, SparseDelta]], digest: str
    ) -> None:
        self.held, self.name = held, name
        self.nnz = 0
        self._key = digest.encode()[:64]
        self._positions: dict[int, Tensor] = {}
        self._order = agree(held.ranks, lambda: self._ordered(FixedSupport.of(read()), digest))

    def update(self, values: Tensor) -> None:
        """Exchange the adapter's values, in the weights too if it is active.

        Args:
            values: ``(k,)`` deltas of the whole adapter, finite, on the CPU.

        Raises:
            AdapterError: If there are not k of them, or one is not finite; nothing has changed.
            ServeError: As `Held.activate`; the values are those of before.
        """
        held = self.held
        before, parts = agree(held.ranks, lambda: self._new(values))
        raw = values.detach().contiguous().view(torch.uint8).numpy().data
        digest = hashlib.blake2b(raw, digest_size=16, key=self._key).hexdigest()
        held.adapters[self.name] = before._replace(parts=parts, digest=digest)
        if self.name in held.active:
            try:
                held.activate(held.active)
            except Exception:
                held.adapters[self.name] = before
                raise

    def _new(self, values: Tensor) -> tuple[Loaded, dict[int, Part]]:
        loaded = self._checked(values)
        parts = loaded.parts.items()
        return loaded, {key: part.with_values(values[self._order[key]]) for key, part in parts}

    def _ordered(self, fixed: FixedSupport, digest: str) -> dict[int, Tensor]:
        parts = self._loaded().parts
        if fixed.digest != digest:
            raise AdapterError(
                f"the sender's positions of adapter {self.name!r} have the hash {digest}, those "
                f"at the path {fixed.digest}: save the adapter that is trained"
            )
        self.nnz = fixed.nnz
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        offset = 0
        for name, support in fixed.supports.items():
            for placement in self.held._place(name, support.shape):
                entries, positions = placement.locate(support.indices)
                found.setdefault(placement.key, []).append(
                    (entries.cpu() + offset, positions.cpu())
                )
            offset += support.nnz
        order = {}
        for key, pieces in found.items():
            positions, by = torch.cat([where for _, where in pieces]).sort()
            order[key] = torch.cat([entries for entries, _ in pieces])[by]
            here = parts[key].positions.cpu().long() if key in parts else positions[:0]
            if not torch.equal(positions, here):
                raise AdapterError(
                    f"adapter {self.name!r} was loaded with other positions than those at the path"
                )
            if key in parts:
                self._positions[key] = parts[key].positions
        if not parts.keys() <= order.keys():
            raise AdapterError(f"adapter {self.name!r} was loaded with more than is at the path")
        return order

    def _loaded(self) -> Loaded:
        adapters = self.held.adapters
        if self.name not in adapters:
            raise UnknownAdapterError(
                f"no adapter {self.name!r} is loaded.{did_you_mean(self.name, adapters)}"
            )
        return adapters[self.name]

    def _checked(self, values: Tensor) -> Loaded:
        if values.shape != (self.nnz,) or not values.is_floating_point():
            raise AdapterError(
                f"adapter {self.name!r} has {self.nnz} values, not "
                f"{tuple(values.shape)} of {values.dtype}"
            )
        check_finite(values, f"adapter {self.name!r} that were sent")
        loaded = self._loaded()
        if any(
            part.positions is not self._positions.get(key) for key, part in loaded.parts.items()
        ):
            raise AdapterError(
                f"adapter {self.name!r} was loaded anew since the positions were agreed on"
            )
        return loaded
