# SPDX-License-Identifier: Apache-2.0
"""The difference of two checkpoints, written as a link.

Both are read once, a piece of a tensor at a time, whatever their size. A tensor stands on the one
of its name, if that has its dtype and shape; else on one that is gone and has the very same bits,
and was renamed; else it is carried whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shira.chain.coding import Bytes, changed_in, encode_piece
from shira.chain.files import (
    Counter,
    Reader,
    ahead,
    count_of,
    file_hash,
    other_files,
    read_pieces,
    size_of,
)
from shira.chain.link import (
    LinkWriter,
    check_names,
    checkpoint_hash,
    digits_of,
    tensor_hash,
    writing_link,
)
from shira.checkpoints.entries import Progress, check_output
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.errors import ConfigError
from shira.store.atomic import check_outputs
from shira.store.header import Stored, width_of


@dataclass(frozen=True)
class ChangedTensor:
    """The report on a tensor.

    Attributes:
        name: Its name.
        dtype: Its dtype, as ``"BF16"``.
        shape: Its shape.
        old: The old tensor that it stands on; None: it is carried whole.
        changed: Entries that are told anew.
        size: Bytes in the link.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    old: str | None
    changed: int
    size: int


@dataclass(frozen=True)
class Difference:
    """The report of `diff`.

    Attributes:
        output: The link.
        old: The hash of the checkpoint that it stands on.
        new: The hash of the one that it makes.
        size: Bytes of the link.
        numel: Entries of the new checkpoint.
        tensors: The tensors that are not as they were.
        gone: The tensors that are no longer there.
        carried: Other files that the link carries: those that changed.
        left_out: Files that are no part of the chain: other copies of the weights, pickles.
    """

    output: Path
    old: str
    new: str
    size: int
    numel: int
    tensors: tuple[ChangedTensor, ...]
    gone: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def changed(self) -> int:
        """Entries that are told anew."""
        return sum(tensor.changed for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {**asdict(self), "output": str(self.output), "changed": self.changed}


def diff(
    old: str | os.PathLike[str] | Checkpoint,
    new: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Write the link from one checkpoint to the next.

    Args:
        old: A safetensors checkpoint: a folder, one file, or a name on the hub.
        new: The next one.
        output: The file to write, ``.safetensors``. It appears as a whole.
        overwrite: Replace a file that is there already.
        progress: Told the bytes done and those there are in all.

    Raises:
        FileNotFoundError: If one of the two is not there.
        FileFormatError: If one of the two is damaged.
        ConfigError: If the output exists, or lies in a checkpoint, or a folder has a file whose
            name cannot stand in a link, or the new one's headers are longer than one can hold.

    Example:
        >>> from safetensors.torch import load_file, save_file
        >>> weight = torch.arange(600.0).reshape(20, 30)
        >>> save_file({"w": weight}, "old.safetensors")
        >>> weight[3, 4] += 0.5
        >>> save_file({"w": weight}, "new.safetensors")
        >>> shira.chain.diff("old.safetensors", "new.safetensors", "step.safetensors").changed
        1
        >>> told = shira.chain.apply("old.safetensors", ["step.safetensors"], "again.safetensors")
        >>> torch.equal(load_file("again.safetensors")["w"], weight)
        True
    """
    before, after = open_checkpoint(old), open_checkpoint(new)
    check_outputs({"output": output}, [], [before.path, after.path])
    target = check_output(False, output, overwrite)
    (was, _), (others, left_out) = other_files(before), other_files(after)
    folder = after.path.is_dir()
    own = [path.name for path in after.files]
    dropped = sorted({*was} - {*others, *own})
    for checkpoint, names in ((after, [*own, *others]), (before, dropped)):
        try:
            check_names(names)
        except ValueError as error:
            raise ConfigError(f"{checkpoint.path}: no link can have its files: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    told = Counter(progress, size_of(before) + size_of(after))
    with Reader(before, told) as one, Reader(after, told) as two, writing_link(target) as link:
        tensors, gone, reports = _tensors(one, two, link)
        hashes = {key: claim.get("was", claim["hash"]) for key, claim in tensors.items()}
        standing = {key: told for key, told in hashes.items() if told is not None} | gone
        made = {key: claim["hash"] for key, claim in tensors.items()}
        table: dict[str, Any] = {
            "folder": folder,
            "files": {path.name: _header(path) for path in after.files},
            "tensors": tensors,
            "gone": gone,
            "others": {name: _other(path, was.get(name), link) for name, path in others.items()},
            "dropped": dropped,
        }
        ends = checkpoint_hash(standing), checkpoint_hash(made)
        link.finish(table, *ends)
    carried = tuple(name for name, claim in table["others"].items() if "pieces" in claim)
    numel = sum((s.end - s.start) // width_of(s.dtype) for s in after.tensors.values())
    size = target.stat().st_size
    return Difference(target, *ends, size, numel, reports, tuple(gone), carried, tuple(left_out))


def _tensors(
    old: Reader, new: Reader, link: LinkWriter
) -> tuple[dict[str, Any], dict[str, str], tuple[ChangedTensor, ...]]:
    """Write the pieces of all tensors; return their claims, hashes of those gone, and reports."""
    before, after = old.checkpoint.tensors, new.checkpoint.tensors
    gone = {key: old.hash(stored) for key, stored in before.items() if key not in after}
    by_hash = {told: key for key, told in gone.items()}
    claims, reports = {}, []
    for key in sorted(after, key=lambda key: (str(after[key].file), after[key].start)):
        stored, was = after[key], before.get(key)
        source: str | None = key
        if was is not None and (was.dtype, was.shape) == (stored.dtype, stored.shape):
            claim, changed, size = _pair(stored, was, old, new, link)
        else:
            made = new.hash(stored) if gone else ""
            source = by_hash.get(made)
            claim, changed, size = {"hash": made, "from": source}, 0, 0
            if source is None:
                claim, changed, size = _pair(stored, None, old, new, link)
                claim["from"] = None
            claim["was"] = None if was is None else old.hash(was)
        claims[key] = claim
        if size or source != key:
            place = (key, stored.dtype, stored.shape)
            reports.append(ChangedTensor(*place, source, changed, size))
    return claims, gone, tuple(reports)


def _pair(
    stored: Stored, was: Stored | None, old: Reader, new: Reader, link: LinkWriter
) -> tuple[dict[str, Any], int, int]:
    """Write a tensor's pieces; return its claim, how many entries it tells, and the bytes."""
    width = width_of(stored.dtype)
    digests = [tensor_hash(stored.dtype, stored.shape) for _ in range(2)]

    def read() -> Iterator[tuple[Bytes, Bytes | None]]:
        for number in range(count_of(stored.end - stored.start)):
            now = new.piece(stored, number)
            then = None if was is None else old.piece(was, number)
            yield now, then

    def code(pieces: tuple[Bytes, Bytes | None]) -> tuple[Bytes, Bytes | None, bytes]:
        now, then = pieces
        return now, then, encode_piece(now, then, width)

    lengths, changed = [], 0
    for now, then, coded in ahead(code, read()):
        digests[0].update(now)
        if then is not None:
            digests[1].update(then)
        lengths.append(link.append(coded))
        changed += changed_in(coded, now.size // width)
    claim: dict[str, Any] = {"hash": digits_of(digests[0])}
    if was is None or any(lengths):
        claim["pieces"] = lengths
        if was is not None:
            claim["was"] = digits_of(digests[1])
    return claim, changed, sum(lengths)


def _header(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode()


def _other(path: Path, was: Path | None, link: LinkWriter) -> Mapping[str, Any]:
    """Write a file that is no tensor's, unless it is as it was; return its claim."""
    claim: dict[str, Any] = {"hash": file_hash(path), "size": path.stat().st_size}
    if was is not None and was.stat().st_size == claim["size"] and file_hash(was) == claim["hash"]:
        return claim
    pieces = (np.frombuffer(raw, np.uint8) for raw in read_pieces(path))
    claim["pieces"] = [link.append(encode_piece(piece, None, 1)) for piece in pieces]
    return claim
