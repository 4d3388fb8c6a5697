# SPDX-License-Identifier: Apache-2.0
"""`FixedSupport`: the positions that a trainer and an engine agree on, so that values travel alone.

In an RL loop the mask stays and the values change at each update: k values are all there is to
send. Both sides order them alike (parameters by name, entries by position) and know the positions
by one hash, so that values can never land elsewhere. Plain values; no engine, no transport.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import AdapterError
from shira.support import Support


class FixedSupport:
    """The supports of an adapter, in the order of their names.

    Attributes:
        supports: ``{parameter name: Support}``, by name.
        nnz: Entries in all, k.
        digest: Of names, shapes and positions: 32 hex digits. Equal exactly if the positions are.
    """

    def __init__(self, supports: Mapping[str, Support]) -> None:
        self.supports = {name: supports[name].to("cpu") for name in sorted(supports)}
        self.nnz = sum(support.nnz for support in self.supports.values())
        digest = hashlib.blake2b(digest_size=16)
        for name, support in self.supports.items():
            digest.update(f"{name}\0{support.shape}\0{support.nnz}\0".encode())
            raw = support.indices.to(torch.int64).contiguous()
            digest.update(raw.view(torch.uint8).numpy().data)
        self.digest = digest.hexdigest()

    @classmethod
    def of(cls, adapter: Mapping[str, SparseDelta]) -> FixedSupport:
        """Return the support of an adapter.

        Raises:
            AdapterError: If it has whole tensors, which have no support.
        """
        _require_sparse(adapter)
        return cls({name: delta.support for name, delta in adapter.items()})

    def flat(self, adapter: Mapping[str, SparseDelta], dtype: torch.dtype | None = None) -> Tensor:
        """The values of an adapter with this support: ``(k,)`` on the CPU.

        Args:
            adapter: Its deltas.
            dtype: Of the result; None: the widest of its values'.

        Raises:
            AdapterError: If its support is another, or a value is not finite (in that dtype).
        """
        if adapter.keys() != self.supports.keys():
            odd = sorted(adapter.keys() ^ self.supports.keys())[0]
            raise AdapterError(f"the support was fixed, but {odd!r} is in one of both alone")
        parts = []
        for name, support in self.supports.items():
            delta = adapter[name]
            if delta.support.to("cpu") != support:
                raise AdapterError(f"the support was fixed, but {name!r} has other positions now")
            parts.append(delta.values.detach().cpu())
        joined = torch.cat(parts) if parts else torch.empty(0)
        joined = joined if dtype is None else joined.to(dtype)
        check_finite(joined, "the adapter")
        return joined

    def adapter(self, values: Tensor) -> Adapter:
        """The reverse: an adapter of this support from ``(k,)`` values.

        Raises:
            AdapterError: If there are not k of them.
        """
        if values.shape != (self.nnz,):
            raise AdapterError(f"the support has {self.nnz} entries, not {tuple(values.shape)}")
        each = torch.split(values, [support.nnz for support in self.supports.values()])
        return Adapter(
            {
                name: SparseDelta(support, part)
                for (name, support), part in zip(self.supports.items(), each, strict=True)
            }
        )


def check_finite(values: Tensor, of: str) -> None:
    """Check that values are numbers.

    Args:
        values: ``(k,)`` floating point.
        of: What they belong to, for the message.

    Raises:
        AdapterError: If one is infinite or NaN.
    """
    if not bool(torch.isfinite(values).all()):
        odd = int((~torch.isfinite(values)).sum())
        dtype = str(values.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{odd} of the {values.numel()} values of {of} are not finite in {dtype}"
        )


def _require_sparse(adapter: Mapping[str, SparseDelta]) -> None:
    if isinstance(adapter, Adapter):
        adapter.require_sparse("values that travel alone")
