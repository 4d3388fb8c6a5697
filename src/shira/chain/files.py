# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a chain sees it: tensors and other files, read in pieces, and their hashes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar

from shira.chain.coding import PIECE, Bytes
from shira.chain.link import digits_of, tensor_hash
from shira.checkpoints.entries import Progress, files_of
from shira.checkpoints.opening import Checkpoint
from shira.store.header import Stored, read_bytes

T = TypeVar("T")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp")
_WORKERS = min(4, os.cpu_count() or 1)


class Reader:
    """The open files of a checkpoint; a context manager, which several threads may use."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int], None]) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()
        self.lock = Lock()
        self._progress = progress

    def __enter__(self) -> Reader:
        for path in self.checkpoint.files:
            self._files[path] = self._stack.enter_context(open(path, "rb", buffering=0))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def piece(self, stored: Stored, number: int) -> Bytes:
        """Read a piece of a tensor."""
        first = number * PIECE
        with self.lock:
            size = min(PIECE, stored.end - stored.start - first)
            self._progress(size)
            return read_bytes(self._files[stored.file], stored, first, size)

    def hash(self, stored: Stored) -> str:
        """Return a tensor's hash."""
        digest = tensor_hash(stored.dtype, stored.shape)
        for number in range(count_of(stored.end - stored.start)):
            digest.update(self.piece(stored, number))
        return digits_of(digest)

    def hashes(self) -> dict[str, str]:
        """Return the hash of each tensor."""
        tensors = self.checkpoint.tensors
        return dict(zip(tensors, ahead(self.hash, tensors.values()), strict=True))


class Counter:
    """Bytes that are done, for whoever is told of progress; threads may count together."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, size: int) -> None:
        """Count so many more."""
        self._done += size
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def count_of(size: int) -> int:
    """Return the number of pieces of so many bytes."""
    return -(-size // PIECE)


def ahead(work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Give ``work(item)`` of each in order, a few of them done ahead by threads."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > _WORKERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def size_of(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(stored.end - stored.start for stored in checkpoint.tensors.values())


def other_files(checkpoint: Checkpoint) -> tuple[Mapping[str, Path], list[str]]:
    """Return the files of the folder beside the weights, by name, and those that are left out.

    Left out are other copies of the weights, pickles (the state of a training run) and hidden
    folders.
    """
    if not checkpoint.path.is_dir():
        return {}, []
    along, left_out = files_of(checkpoint)
    others = {name: path for path, name in along.items() if path not in checkpoint.files}
    pickles = [name for name in others if name.endswith(_PICKLES)]
    kept = {name: others[name] for name in sorted(others) if name not in pickles}
    return kept, sorted(left_out + pickles)


def read_pieces(path: Path) -> Iterator[bytes]:
    """Read a file that is no tensor's, a piece after the other."""
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def file_hash(path: Path) -> str:
    """Return the hash of a file that is no tensor's."""
    digest = tensor_hash("", ())
    for piece in read_pieces(path):
        digest.update(piece)
    return digits_of(digest)
