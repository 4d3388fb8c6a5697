# SPDX-License-Identifier: Apache-2.0
"""A link: the file that holds what changed from one checkpoint to the next.

It is a safetensors file of two tensors of bytes: ``data``, the coded pieces one after the other,
and ``table``, a deflated JSON object that says what they are. Its metadata has the hash of the
checkpoint that it stands on and of the one that it makes. ``docs/chain.md`` specifies it.

The hash of a tensor is SHA-256, the first 32 hex digits, of its dtype, shape and bytes; that of a
checkpoint is one of its tensors' names and hashes, in order, in whatever files they lie.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from shira._version import __version__
from shira.chain.coding import LONGEST, PIECE
from shira.errors import ConfigError, FileFormatError
from shira.store.atomic import replacing
from shira.store.header import (
    HEADER_LIMIT,
    Stored,
    TensorFile,
    open_tensors,
    parse_header,
    read_bytes,
    refusing,
)
from shira.store.json_text import open_regular, parse_object

FORMAT, VERSION = "shira-link", "1"
OPEN = 32
"""Files of links that are open at a time, however long a chain is."""

_DIGITS = 32
_HASH = re.compile(rf"[0-9a-f]{{{_DIGITS}}}")
_HEADER = 1024  # bytes of a link's own header, padded with blanks
_INFLATION = 64  # a table is at most so many times as long as it is deflated, or else
_SMALL = 2**23  # so long; and always at most HEADER_LIMIT


class Source(NamedTuple):
    """A tensor, or another file, of the checkpoint that a link makes.

    Attributes:
        hash: Of its bits.
        size: Bytes.
        old: The tensor of the old checkpoint that it stands on; None: of no other.
        pieces: The lengths of its coded pieces; None: as it was.
        at: Where the first of them begins in ``data``.
    """

    hash: str
    size: int
    old: str | None
    pieces: tuple[int, ...] | None
    at: int


@dataclass(frozen=True)
class Link:
    """An open link, whose table is checked.

    Attributes:
        path: The file.
        before: The hash of each tensor of the checkpoint that it stands on.
        headers: The header of each safetensors file that it makes, as the bytes of its JSON.
        places: Where each tensor lies in which of them.
        tensors: How each tensor is made.
        others: How each other file is made; a folder's alone.
        dropped: Other files of the old folder that are no longer there.
        folder: Whether it makes a folder, or one file.
        checksum: Of data and table.
    """

    path: Path
    file: TensorFile
    before: Mapping[str, str]
    headers: Mapping[str, bytes]
    places: Mapping[str, Stored]
    tensors: Mapping[str, Source]
    others: Mapping[str, Source]
    dropped: tuple[str, ...]
    folder: bool
    checksum: str

    @property
    def old(self) -> str:
        """The hash of the checkpoint that it stands on."""
        return checkpoint_hash(self.before)

    @property
    def new(self) -> str:
        """The hash of the checkpoint that it makes."""
        return checkpoint_hash({key: source.hash for key, source in self.tensors.items()})

    def coded(self, source: Source, piece: int) -> bytes:
        """Read a coded piece."""
        assert source.pieces is not None
        first = source.at + sum(source.pieces[:piece])
        data = self.file.tensors["data"]
        return read_bytes(self.file.file, data, first, source.pieces[piece]).tobytes()

    def check_data(self) -> None:
        """Raise a `FileFormatError` if the file is not as it was written."""
        digest = hashlib.sha256()
        for stored in (self.file.tensors["data"], self.file.tensors["table"]):
            for piece in pieces_of(self.file.file, stored):
                digest.update(piece)
        if digest.hexdigest()[:_DIGITS] != self.checksum:
            raise damaged(self, "its data are not those that were written (checksum)")


def damaged(link: Link, why: str) -> FileFormatError:
    """Return the error of a link that cannot be right."""
    return FileFormatError(f"{link.path}: damaged: {why}; make or fetch it anew")


def tensor_hash(dtype: str, shape: Iterable[int]) -> Any:
    """Return the hash to give a tensor's bytes to; `digits_of` ends it."""
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


def digits_of(digest: Any) -> str:
    """Return the digits of a hash."""
    return str(digest.hexdigest()[:_DIGITS])


def checkpoint_hash(hashes: Mapping[str, str]) -> str:
    """Return the hash of a checkpoint from those of its tensors."""
    return digits_of(hashlib.sha256(json.dumps(sorted(hashes.items())).encode()))


def pieces_of(file: BinaryIO, stored: Stored) -> Iterator[Any]:
    """Read a stored tensor's bytes, a piece after the other."""
    size = stored.end - stored.start
    for first in range(0, size, PIECE):
        yield read_bytes(file, stored, first, min(PIECE, size - first))


@dataclass
class LinkWriter:
    """A link in the making: pieces are appended, the table comes last."""

    file: BinaryIO
    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def append(self, coded: bytes) -> int:
        """Write a coded piece; return its length."""
        self.file.write(coded)
        self.digest.update(coded)
        self.size += len(coded)
        return len(coded)

    def finish(self, table: Mapping[str, Any], old: str, new: str) -> None:
        """Write the table and, at last, the header.

        Raises:
            ConfigError: If the table is longer than one that can be read.
        """
        whole = json.dumps(table, separators=(",", ":")).encode()
        if len(whole) > HEADER_LIMIT:
            raise ConfigError(
                f"the headers of the new checkpoint's files and the names in it take {len(whole)} "
                f"bytes, more than a link can have (limit {HEADER_LIMIT}); shorten their metadata"
            )
        short = zlib.compress(whole, 9)
        if len(whole) > _longest_table(len(short)):
            short = zlib.compress(whole, 0)
        data = self.size
        self.append(short)
        spans = {"data": (0, data), "table": (data, self.size)}
        metadata = {"format": FORMAT, "version": VERSION, "library": f"shira {__version__}"}
        metadata |= {"old": old, "new": new, "checksum": digits_of(self.digest)}
        claims = {
            name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            for name, (start, end) in spans.items()
        }
        text = json.dumps({"__metadata__": metadata, **claims}, separators=(",", ":")).encode()
        length = _HEADER - 8
        assert len(text) <= length
        self.file.seek(0)
        self.file.write(length.to_bytes(8, "little") + text.ljust(length))


@contextmanager
def writing_link(path: str | os.PathLike[str]) -> Iterator[LinkWriter]:
    """Give a writer of a link that takes the place of what is at a path at the end."""
    with (
        replacing(os.path.realpath(path)) as temporary,
        open(temporary, "wb", buffering=2**20) as file,
    ):
        file.seek(_HEADER)
        yield LinkWriter(file)


class OpenFiles:
    """The files of any number of links, of which at most `OPEN` are open at a time."""

    def __init__(self) -> None:
        self._open: OrderedDict[_Reopened, BinaryIO] = OrderedDict()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def add(self, link: Link) -> Link:
        """Return the link with a file that is opened when it is read."""
        file: Any = _Reopened(self, link.path, _identity(link.file.file))
        return replace(link, file=replace(link.file, file=file))

    def of(self, link: _Reopened) -> BinaryIO:
        """Return a link's file, open; `FileFormatError` if another has taken its place."""
        if link not in self._open:
            while len(self._open) >= OPEN:
                self._open.popitem(last=False)[1].close()
            file = open_regular(link.path)
            if _identity(file) != link.identity:
                file.close()
                raise FileFormatError(
                    f"{link.path}: was replaced or written to while it was read; begin again"
                )
            self._open[link] = file
        self._open.move_to_end(link)
        return self._open[link]


class _Reopened:
    """As much of a file as `read_bytes` asks for; it may have been closed between two calls."""

    def __init__(self, files: OpenFiles, path: Path, identity: tuple[int, ...]) -> None:
        self.files, self.path, self.identity = files, path, identity
        self._at = 0

    def seek(self, at: int) -> None:
        self._at = at

    def readinto(self, buffer: memoryview) -> int:
        file: Any = self.files.of(self)
        file.seek(self._at)
        got: int = file.readinto(buffer) or 0
        self._at += got
        return got


def _identity(file: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_link(path: str | os.PathLike[str]) -> Iterator[Link]:
    """Open a link, after its table was checked: names, sizes and hashes fit one another.

    Raises:
        FileNotFoundError: If there is none.
        FileFormatError: If it is damaged, hostile, no link or of a later version.
    """
    with open_tensors(path) as file:
        told = file.metadata
        if told.get("format") != FORMAT:
            raise FileFormatError(f"{file.path}: no link of a chain (shira diff writes one)")
        if told.get("version") != VERSION:
            raise FileFormatError(
                f"{file.path}: version {told.get('version')!r} of links is not known, only "
                f"{VERSION!r}; update shira"
            )
        if {name: s.dtype for name, s in file.tensors.items()} != {"data": "U8", "table": "U8"}:
            raise FileFormatError(f"{file.path}: a link holds the bytes of data and table alone")
        with refusing(file.path, "the table"):
            link = _parsed(file, _inflated(file))
            if (link.old, link.new) != (told.get("old"), told.get("new")):
                raise ValueError("its hashes are not those of the metadata")
        yield link


def _longest_table(deflated: int) -> int:
    """Return how long a table can be that takes so many bytes in the file."""
    return min(max(_SMALL, _INFLATION * deflated), HEADER_LIMIT)


def _inflated(file: TensorFile) -> dict[str, Any]:
    stored = file.tensors["table"]
    size = stored.end - stored.start
    limit = _longest_table(size)
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(read_bytes(file.file, stored, 0, size).data, limit)
    except zlib.error as error:
        raise ValueError(f"it cannot be inflated: {error}") from error
    if not inflate.eof or inflate.unused_data:
        raise ValueError(f"it is cut off, or longer than {limit} bytes")
    return parse_object(raw, file.path, "table")


def _parsed(file: TensorFile, table: dict[str, Any]) -> Link:
    kinds = {"folder": bool, "files": dict, "tensors": dict, "others": dict, "gone": dict}
    kinds["dropped"] = list
    if set(table) != set(kinds) or any(type(table[key]) is not kinds[key] for key in kinds):
        raise ValueError(f"it has {', '.join(kinds)}")
    folder = table["folder"]
    check_names([*table["files"], *table["others"]], table["dropped"])
    if not folder and (len(table["files"]), len(table["others"])) != (1, 0):
        raise ValueError("a single file is one, and has no others")
    headers: dict[str, bytes] = {}
    places: dict[str, Stored] = {}
    for name, text in table["files"].items():
        if not isinstance(text, str):
            raise ValueError(f"the header of {name!r} is a text")
        headers[name] = text.encode()
        found, _ = parse_header(headers[name], file.path)
        if twice := places.keys() & found.keys():
            raise ValueError(f"two files hold {min(twice)!r}")
        places |= {key: place._replace(file=Path(name)) for key, place in found.items()}
    if places.keys() != table["tensors"].keys():
        odd = min(places.keys() ^ table["tensors"].keys())
        raise ValueError(f"tensor {odd!r} is in the headers or in the list, not in both")
    before = {key: _hash(told) for key, told in table["gone"].items()}
    tensors: dict[str, Source] = {}
    others: dict[str, Source] = {}
    at = 0
    for key, claim in table["tensors"].items():
        place = places[key]
        tensors[key], at = _source(claim, key, place.end - place.start, at)
        if "was" not in claim or claim["was"] is not None:
            if key in before:
                raise ValueError(f"tensor {key!r} is gone and there")
            before[key] = _hash(claim.get("was", claim["hash"]))
    for key, source in tensors.items():
        if source.old is not None and source.old not in before:
            raise ValueError(f"tensor {key!r} stands on {source.old!r}, which there is not")
        if source.pieces is None and before[str(source.old)] != source.hash:
            raise ValueError(f"tensor {key!r} has changed, but not how")
    for name, claim in table["others"].items():
        size = claim.get("size") if isinstance(claim, dict) else None
        if type(size) is not int or not 0 <= size < 2**62:
            raise ValueError(f"{name!r} has a size")
        others[name], at = _source(claim, name, size, at)
    if at != file.tensors["data"].end - file.tensors["data"].start:
        raise ValueError("its pieces are not all of the data")
    made = (before, headers, places, tensors, others, tuple(table["dropped"]), folder)
    return Link(file.path, file, *made, str(file.metadata.get("checksum")))


def _source(claim: Any, key: str, size: int, at: int) -> tuple[Source, int]:
    """Return how something is made, and where the data of the next begin."""
    known = {"hash", "was", "from", "pieces", "size"}
    if not isinstance(claim, dict) or set(claim) - known:
        raise ValueError(f"{key!r} has {', '.join(sorted(known))}")
    old = claim.get("from", None if claim.get("was", "") is None else key)
    if old is not None and not isinstance(old, str):
        raise ValueError(f"{key!r} stands on the name of a tensor")
    pieces = claim.get("pieces")
    if pieces is None:
        if old is None:
            raise ValueError(f"{key!r} is new, but has no pieces")
        return Source(_hash(claim.get("hash")), size, old, None, at), at
    if not isinstance(pieces, list) or not {int}.issuperset(map(type, pieces)):
        raise ValueError(f"the pieces of {key!r} are lengths")
    if len(pieces) != math.ceil(size / PIECE):
        raise ValueError(f"{key!r} of {size} bytes has {len(pieces)} pieces")
    if any(not 0 <= length <= LONGEST for length in pieces):
        raise ValueError(f"a piece of {key!r} is longer than a piece can be")
    if old is None and not all(pieces):
        raise ValueError(f"{key!r} is new, but a piece of it is as it was")
    found = Source(_hash(claim.get("hash")), size, old, tuple(pieces), at)
    return found, at + sum(pieces)


def _hash(told: Any) -> str:
    if not isinstance(told, str) or not _HASH.fullmatch(told):
        raise ValueError(f"a hash is {_DIGITS} hex digits, not {str(told)[:40]!r}")
    return told


def check_names(names: Sequence[Any], others: Sequence[Any] = ()) -> None:
    """Refuse names of files that lead out of a folder, or that no folder can have together."""
    for name in (*names, *others):
        if not isinstance(name, str) or not _inside(name):
            raise ValueError(f"{str(name)[:200]!r} is no file inside a folder")
    known = set(names)
    if len(known) < len(names):
        raise ValueError("two files are of one name")
    for name in names:
        if found := known & set(map(str, PurePosixPath(name).parents)):
            raise ValueError(f"{min(found)!r} is a file and a folder")


def _inside(name: str) -> bool:
    # (half of a surrogate pair stands for a byte of a name that is no UTF-8)
    odd = any(c in "\\:\0" or "\ud800" <= c <= "\udfff" for c in name)
    return not odd and not any(part in ("", ".", "..") for part in name.split("/"))
