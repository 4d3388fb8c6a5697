# SPDX-License-Identifier: Apache-2.0
"""Links applied to a checkpoint, and where in a chain a checkpoint stands.

The checkpoint's hash says which link of those given comes next, so a chain can be entered anywhere.
Then each tensor goes through all that are left, a piece at a time, and is written once. The hash of
what is written is checked before it takes its place, in one step of the file system; whatever goes
wrong before, and whenever the process is killed, what was there is still there.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shira.chain.coding import PIECE, Bytes, decode_piece, stands_alone
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
    Link,
    OpenFiles,
    Source,
    checkpoint_hash,
    damaged,
    digits_of,
    open_link,
    tensor_hash,
)
from shira.checkpoints.entries import Progress, check_output, files_of
from shira.checkpoints.opening import Checkpoint, open_checkpoint
from shira.errors import ConfigError, FileFormatError, WrongBaseError, listed
from shira.store.atomic import check_outputs, replacing, restore
from shira.store.header import Stored, width_of

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Applied:
    """The report of `apply`.

    Attributes:
        output: Where the new checkpoint is.
        hash: Its hash.
        skipped: Links that the checkpoint had in it already.
        applied: Links that were applied.
        changed: Tensors that are not as they were.
        files: The files that were written.
        size: Their bytes.
    """

    output: Path
    hash: str
    skipped: int
    applied: int
    changed: tuple[str, ...]
    files: tuple[str, ...]
    size: int

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {**asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class Verified:
    """The report of `verify`.

    Attributes:
        links: The number of links, each sound, and each standing on the one before.
        old: The hash of the checkpoint that the first stands on.
        new: The hash of the one that the last makes.
        applied: The number of links that the checkpoint has in it; None if none was given.
        other_files: Files of the checkpoint's folder that are not what the links say.
    """

    links: int
    old: str
    new: str
    applied: int | None
    other_files: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)


def apply(
    old: AnyPath | Checkpoint,
    links: AnyPath | Sequence[AnyPath],
    output: AnyPath | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Write the checkpoint that links make of one: the very files of the one they were made from.

    Args:
        old: A safetensors checkpoint: a folder, one file, or a name on the hub. It is one of those
            that the links stand on, or the one that the last makes.
        links: The links, in order. Those that the checkpoint has in it already are passed over.
        output: Where the new one goes, a folder or a file as the links' is. It appears as a whole.
        in_place: Put it in the place of the old one instead.
        overwrite: Replace an output that is there already; in place, also remove files that the
            links do not know.
        progress: Told the bytes done and those there are in all.

    Raises:
        FileNotFoundError: If something is not there.
        FileFormatError: If the checkpoint or a link is damaged, or a link does not stand on the one
            before it.
        WrongBaseError: If none of the links stands on the checkpoint.
        ConfigError: If the output exists, or would overwrite what is read, or files would be lost.
    """
    paths = listed_links(links)
    if in_place and not isinstance(old, Checkpoint):
        restore(Path(os.path.realpath(old)))
    checkpoint = open_checkpoint(old)
    if in_place == (output is not None):
        raise ConfigError("name an output, or ask for in_place (--in-place): one of the two")
    if in_place and not isinstance(old, Checkpoint) and not os.path.exists(old):
        raise ConfigError(
            f"{old} is a name on the hub, whose cache is not written to; name an output"
        )
    goal = checkpoint.path if output is None else output
    check_outputs({"output": goal}, paths, [] if in_place else [checkpoint.path])
    with open_chain(paths) as chain:
        last = chain[-1]
        if in_place:
            _check_in_place(checkpoint, chain, overwrite)
            target = Path(os.path.realpath(goal))
        else:
            target = check_output(last.folder, goal, overwrite)
        size = sum(source.size for source in last.tensors.values())
        with Reader(checkpoint, Counter(progress, size_of(checkpoint) + size)) as reader:
            hashes = reader.hashes()
            at = place_in(chain, hashes, checkpoint.path)
            made = Made(reader, hashes, chain[at:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, folder=last.folder) as temporary:
                changed = made.write(last, temporary)
        files = (*last.headers, *last.others) if last.folder else (target.name,)
        size += sum(len(header) + 8 for header in last.headers.values())
        size += sum(source.size for source in last.others.values())
        return Applied(target, last.new, at, len(chain) - at, changed, files, size)


def verify(
    links: AnyPath | Sequence[AnyPath],
    checkpoint: AnyPath | Checkpoint | None = None,
    *,
    progress: Progress | None = None,
) -> Verified:
    """Check links, each by itself and as a chain, and tell where in it a checkpoint stands.

    Args:
        links: The links, in order.
        checkpoint: A checkpoint to look for, every bit of its tensors.
        progress: Told the bytes done and those there are in all.

    Raises:
        FileNotFoundError: If something is not there.
        FileFormatError: If the checkpoint or a link is damaged, or a link does not stand on the one
            before it.
        WrongBaseError: If the checkpoint is none of the chain.
    """
    found = None if checkpoint is None else open_checkpoint(checkpoint)
    with open_chain(listed_links(links)) as chain:
        for link in chain:
            link.check_data()
        if found is None:
            return Verified(len(chain), chain[0].old, chain[-1].new, None, ())
        with Reader(found, Counter(progress, size_of(found))) as reader:
            at = place_in(chain, reader.hashes(), found.path)
        others, _ = other_files(found)
        told = chain[at - 1].others if at else {}
        differ = [
            name
            for name, source in told.items()
            if name not in others or file_hash(others[name]) != source.hash
        ]
        return Verified(len(chain), chain[0].old, chain[-1].new, at, tuple(differ))


@contextmanager
def open_chain(paths: Sequence[AnyPath]) -> Iterator[list[Link]]:
    """Open links, and check that each stands on the one before it."""
    with OpenFiles() as files:
        chain = []
        for path in paths:
            with open_link(path) as link:
                chain.append(files.add(link))
        for before, link in itertools.pairwise(chain):
            if before.new != link.old:
                raise FileFormatError(
                    f"{link.path}: does not stand on {before.path}, but on checkpoint {link.old}, "
                    f"not {before.new}; give the links in order, and none left out"
                )
            _check_fit(link, before.places)
        yield chain


def place_in(chain: Sequence[Link], hashes: Mapping[str, str], where: Path) -> int:
    """Return how many links of a chain a checkpoint has in it, by its tensors' hashes.

    Raises:
        WrongBaseError: If it is none of the chain.
    """
    own = checkpoint_hash(hashes)
    for at, link in enumerate(chain):
        if link.old == own:
            return at
    if chain[-1].new == own:
        return len(chain)
    counts = [len(set(link.before.items()) ^ set(hashes.items())) for link in chain]
    nearest = chain[counts.index(min(counts))]
    known = nearest.before
    kinds = {
        "holds other values": [key for key in known if hashes.get(key, known[key]) != known[key]],
        "is missing": sorted(known.keys() - hashes.keys()),
        "is not in the one it was made on": sorted(hashes.keys() - known.keys()),
    }
    told = "; ".join(f"{listed(keys)} {what}" for what, keys in kinds.items() if keys)
    differ = sum(map(len, kinds.values()))
    raise WrongBaseError(
        f"{where}: {nearest.path} does not stand on this checkpoint ({own}) but on {nearest.old}: "
        f"{differ} of {len(known)} tensors differ: {told}. Give the links that lead up to it too, "
        "or a checkpoint of the chain"
    )


class Made:
    """A checkpoint with links applied, a piece at a time."""

    def __init__(self, reader: Reader, hashes: Mapping[str, str], chain: Sequence[Link]) -> None:
        self._reader, self._hashes, self._chain = reader, hashes, chain
        if chain:
            _check_fit(chain[0], reader.checkpoint.tensors)

    def piece(self, key: str, number: int) -> Bytes:
        """Return a piece of a tensor of the last checkpoint."""
        steps: list[tuple[Link, str, bytes]] = []
        source: str | None = key
        for link in reversed(self._chain):
            name, told = str(source), link.tensors[str(source)]
            coded = b"" if told.pieces is None else self._coded(link, told, number)
            if coded:
                steps.append((link, name, coded))
            source = None if stands_alone(coded) else told.old
            if source is None:
                break
        old = None
        if source is not None:
            old = self._reader.piece(self._reader.checkpoint.tensors[source], number)
        for link, name, coded in reversed(steps):
            place = link.places[name]
            size = min(PIECE, place.end - place.start - number * PIECE)
            try:
                old = decode_piece(coded, old, size, width_of(place.dtype))
            except ValueError as error:
                raise damaged(link, f"tensor {name!r}: {error}") from error
        assert old is not None
        return old

    def write(self, last: Link, target: Path) -> tuple[str, ...]:
        """Write the files that the last link makes; return the tensors that are not as they were.

        (The last link may have been applied already, and is not in the chain then.)
        """
        changed: list[str] = []
        for name, header in last.headers.items():
            path = target / name if last.folder else target
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb", buffering=0) as file:
                _put(file, len(header).to_bytes(8, "little") + header)
                keys = [key for key, place in last.places.items() if str(place.file) == name]
                keys.sort(key=lambda key: (last.places[key].start, last.places[key].end))
                changed += self._write_tensors(file, keys, last)
                os.fsync(file.fileno())
            self._copy_mode(name, path)
        for name, other in last.others.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = tensor_hash("", ())
            with open(path, "wb", buffering=0) as file:
                for raw in self._other(name, other, last):
                    digest.update(raw)
                    _put(file, raw)
                os.fsync(file.fileno())
            if digits_of(digest) != other.hash:
                raise WrongBaseError(
                    f"{self._reader.checkpoint.path}: file {name!r} is not as {last.path} says; "
                    "put the one that it was made from in its place, or fetch the links anew"
                )
            self._copy_mode(name, path)
        return tuple(changed)

    def _write_tensors(self, file: BinaryIO, keys: list[str], last: Link) -> list[str]:
        """Write tensors one after the other, and check each; return those that changed."""
        places = last.places
        jobs = [
            (key, number)
            for key in keys
            for number in range(count_of(places[key].end - places[key].start))
        ]
        pieces = ahead(lambda job: self.piece(*job), jobs)
        changed = []
        for key in keys:
            place, told = places[key], last.tensors[key].hash
            digest = tensor_hash(place.dtype, place.shape)
            same = self._hashes.get(key) == told
            for _ in range(count_of(place.end - place.start)):
                raw = next(pieces)
                digest.update(raw)
                _put(file, raw)
            if digits_of(digest) != told:
                raise damaged(last, f"tensor {key!r} does not come out as it was")
            if not same:
                changed.append(key)
        return changed

    def _coded(self, link: Link, source: Source, number: int) -> bytes:
        with self._reader.lock:
            return link.coded(source, number)

    def _other(self, name: str, other: Source, last: Link) -> Iterator[bytes | Bytes]:
        """Read a file that is no tensor's from the last link that carries it, or the old folder."""
        for link in reversed(self._chain):
            source = link.others.get(name)
            if source is None or source.hash != other.hash:
                break
            if source.pieces is not None:
                for number in range(len(source.pieces)):
                    size = min(PIECE, source.size - number * PIECE)
                    try:
                        yield decode_piece(self._coded(link, source, number), None, size, 1)
                    except ValueError as error:
                        raise damaged(link, f"file {name!r}: {error}") from error
                return
        path = self._reader.checkpoint.path / name
        if not path.is_file():
            raise WrongBaseError(
                f"{self._reader.checkpoint.path}: file {name!r} is missing, which {last.path} "
                "takes over from there; put it in its place"
            )
        yield from read_pieces(path)

    def _copy_mode(self, name: str, path: Path) -> None:
        old = self._reader.checkpoint.path / name
        if old.is_file():
            shutil.copymode(old, path)


def _check_fit(link: Link, before: Mapping[str, Stored]) -> None:
    """Check that each tensor of a link is of the dtype and shape of the one that it stands on."""
    for key, source in link.tensors.items():
        if source.old is None:
            continue
        old, new = before.get(source.old), link.places[key]
        if old is None or (old.dtype, old.shape) != (new.dtype, new.shape):
            raise damaged(link, f"tensor {key!r} is of another dtype or shape than {source.old!r}")


def _check_in_place(checkpoint: Checkpoint, chain: Sequence[Link], overwrite: bool) -> None:
    """Refuse to replace a checkpoint if files would be lost that the links do not know."""
    last = chain[-1]
    if checkpoint.path.is_dir() != last.folder:
        kind = "a folder" if last.folder else "a single file"
        raise ConfigError(
            f"{checkpoint.path}: the links make {kind}, which cannot take its place; name an output"
        )
    if not last.folder or overwrite:
        return
    along, behind = files_of(checkpoint)
    known = {name for link in chain for name in (*link.headers, *link.others, *link.dropped)}
    known |= {file.name for file in checkpoint.files}
    if lost := sorted({*along.values(), *behind} - known):
        raise ConfigError(
            f"{checkpoint.path}: {listed(lost)} would be lost, as the links do not know them; name "
            "an output, or allow it (--overwrite)"
        )


def listed_links(links: AnyPath | Iterable[AnyPath]) -> list[AnyPath]:
    """Return the links as a list of at least one."""
    paths: list[AnyPath] = [links] if isinstance(links, (str, os.PathLike)) else list(links)
    if not paths:
        raise ConfigError("there are no links; give at least one")
    return paths


def _put(file: BinaryIO, raw: bytes | Bytes) -> None:
    rest = raw if isinstance(raw, bytes) else raw.data
    while rest:
        rest = rest[file.write(rest) :]
