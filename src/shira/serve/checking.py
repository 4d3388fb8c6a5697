# SPDX-License-Identifier: Apache-2.0
"""Is it this model's adapter, and do its entries lie where the loader's trace says?

Together the ranks must have a place for each entry; some base values there must be the
checkpoint's, where it is at hand; and all of them together must be those of the adapter's base, as
`shira.base.judge` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.errors import PlacementError
from shira.ops.patch import Patch, base_at, same_bits
from shira.serve.placement import Placement
from shira.support import align_indices

Stored = Callable[[str, Tensor], "Tensor | None"]
"""Values of a checkpoint's weight at flat indices, to compare some with; None if not at hand."""

Active = Mapping[int, Patch]
"""What is in the weights now, by storage."""

_SOME = 256  # entries of each part of a weight compared with the checkpoint's


class Found(NamedTuple):
    """The entries of one parameter that live on this rank.

    Attributes:
        pieces: For each place: which entries, and their positions in its storage, both int64.
    """

    pieces: list[tuple[Placement, Tensor, Tensor]]

    @property
    def count(self) -> int:  # type: ignore[override]  # a tuple's count is of no use here
        """How many different entries."""
        if not self.pieces:
            return 0
        return align_indices([entries for _, entries, _ in self.pieces])[0].numel()


def nothing_stored(name: str, indices: Tensor) -> None:
    """No checkpoint to compare with."""


def values_of(found: Found, active: Active) -> tuple[Tensor, Tensor]:
    """Entries that live here, int64 ``(n,)``, and the base's values at them, on the CPU."""
    entries = [torch.empty(0, dtype=torch.int64)]
    values = []
    for placement, which, positions in found.pieces:
        entries.append(which.cpu())
        values.append(_base_at(placement, positions, active))
    return torch.cat(entries), torch.cat(values) if values else torch.empty(0)


def check_layout(
    adapter: Adapter, found: Mapping[str, Found], active: Active, stored: Stored
) -> None:
    """Some base values are where the loader's trace says they are.

    An engine may lay weights out anew after loading (packed for its kernels, experts shuffled) in
    memory of the same shape and dtype; then nothing but the values can tell.

    Raises:
        PlacementError: If they are not.
    """
    for name, each in found.items():
        for placement, entries, positions in each.pieces:
            some = torch.arange(0, entries.numel(), max(1, entries.numel() // _SOME))
            expected = stored(name, adapter[name].support.indices[entries[some]])
            if expected is None:
                break
            held = _base_at(placement, positions[some], active)
            if not same_bits(held, expected.to(held.dtype)):
                raise PlacementError(
                    f"the model does not keep {name!r} as its checkpoint has it: other values "
                    "stand where its loader puts them (packed or shuffled for the engine's "
                    "kernels after loading, or not the weights of that checkpoint?)"
                )


def base_of(name: str, delta: SparseDelta, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``(k,)`` base values at all entries of a parameter, after making sure that all have a place.

    Args:
        name: Of the parameter, for messages.
        delta: The whole delta.
        pieces: From `values_of`, of one rank that has all of it or of all ranks.

    Raises:
        PlacementError: If an entry has no place.
    """
    held = [(entries, values) for entries, values in pieces if entries.numel()]
    base = torch.zeros(delta.nnz, dtype=held[0][1].dtype if held else torch.float32)
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
    return base


def _base_at(placement: Placement, positions: Tensor, active: Active) -> Tensor:
    """The base's values at positions of a storage, whatever is active; on the CPU."""
    where = positions.to(placement.storage.device)
    return base_at(placement.storage, where, active.get(placement.key)).cpu()
