# SPDX-License-Identifier: Apache-2.0
"""Links as sparse patches: the new values of the entries that change, for engines that take these.

The coordinates are those of vLLM's ``SparseWeightPatch``, as of `shira.convert.to_patches`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from shira.chain.applying import Made, listed_links, open_chain, place_in
from shira.chain.coding import PIECE, Bytes, changes
from shira.chain.files import Counter, Reader, ahead, count_of, size_of
from shira.chain.link import Link, damaged, digits_of, tensor_hash
from shira.checkpoints.entries import Progress
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.convert.patches import SparsePatch
from shira.errors import ConfigError
from shira.store.header import FLOATS, Bits, tensor_of, width_of

AnyPath = str | os.PathLike[str]

_LIMIT = 2**31  # entries that int32 indices can count


def to_patches(
    old: AnyPath | Checkpoint,
    links: AnyPath | Sequence[AnyPath],
    *,
    progress: Progress | None = None,
) -> list[SparsePatch]:
    """Make sparse weight patches of what links change in a checkpoint's tensors.

    Memory is that of the patches: six bytes or more for each changed entry.

    Args:
        old: A safetensors checkpoint of the chain, as for `apply`.
        links: The links, in order.
        progress: Told the bytes done and those there are in all.

    Returns:
        One patch for each tensor that changes: its name in the checkpoint, int32 indices, values
        that stand there afterwards, the whole shape.

    Raises:
        FileNotFoundError: If something is not there.
        FileFormatError: If the checkpoint or a link is damaged, or out of order.
        WrongBaseError: If none of the links stands on the checkpoint.
        ConfigError: If a tensor is new, gone, of another shape or dtype, or changes and is no
            F64, F32, F16 or BF16, or has more entries than int32 can count: no patch can tell that.
    """
    checkpoint = open_checkpoint(old)
    with (
        open_chain(listed_links(links)) as chain,
        Reader(checkpoint, Counter(progress, 2 * size_of(checkpoint))) as reader,
    ):
        hashes = reader.hashes()
        made = Made(reader, hashes, chain[place_in(chain, hashes, checkpoint.path) :])
        last = chain[-1]
        changed = [key for key, source in last.tensors.items() if hashes.get(key) != source.hash]
        _check(last, changed, checkpoint)
        return [_patch(key, made, reader, last) for key in changed]


def _check(last: Link, changed: Sequence[str], checkpoint: Checkpoint) -> None:
    """Refuse what no patch can tell."""
    for key in sorted(last.places.keys() | checkpoint.tensors.keys()):
        old, new = checkpoint.tensors.get(key), last.places.get(key)
        cause = ""
        if old is None or new is None:
            cause = "is new" if old is None else "is gone"
        elif (old.dtype, old.shape) != (new.dtype, new.shape):
            cause = "is of another dtype or shape"
        elif key in changed and new.dtype not in FLOATS:
            cause = f"is {new.dtype}, not {', '.join(FLOATS)}"
        elif key in changed and (new.end - new.start) // width_of(new.dtype) >= _LIMIT:
            cause = "has more entries than int32 can count"
        if cause:
            raise ConfigError(
                f"{last.path}: tensor {key!r} {cause}, and no patch can tell that; apply the links "
                "to the checkpoint instead"
            )


def _patch(key: str, made: Made, reader: Reader, last: Link) -> SparsePatch:
    old, place = reader.checkpoint.tensors[key], last.places[key]
    width = width_of(place.dtype)
    digest = tensor_hash(place.dtype, place.shape)

    def piece(number: int) -> tuple[Bytes, tuple[Bits, Bits]]:
        new = made.piece(key, number)
        return new, changes(new, reader.piece(old, number), width)

    where, values = [], []
    for number, (raw, (at, now)) in enumerate(
        ahead(piece, range(count_of(place.end - place.start)))
    ):
        digest.update(raw)
        where.append((at + number * (PIECE // width)).astype(np.int32))
        values.append(now)
    if digits_of(digest) != last.tensors[key].hash:
        raise damaged(last, f"tensor {key!r} does not come out as it was")
    indices, bits = torch.from_numpy(np.concatenate(where)), np.concatenate(values)
    return SparsePatch(key, indices, tensor_of(bits, place), place.shape)
