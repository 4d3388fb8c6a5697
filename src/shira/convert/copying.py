# SPDX-License-Identifier: Apache-2.0
"""Copies of files and folders that appear as a whole: the old one or the new one, never half.

The copy is made under a temporary name in the same folder, flushed to the disk, and then takes its
place in one step. The kernel copies the bytes where it can (and shares them where the file system
can), so no memory is needed; else they go through a small buffer. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shira.store.atomic import _flush_folder as flush_folder

_CHUNK = 2**25  # bytes that are copied between two reports of progress


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its place at the end of the block.

    Whatever is made at the path (file or folder, its files already flushed) becomes the target if
    the block ends well, and goes away if it does not. A killed process can leave a
    ``.<name>.<random>.tmp`` behind, which nothing reads.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{target.name[:200]}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        if temporary.is_dir():
            for folder, _, _ in os.walk(temporary, topdown=False):
                flush_folder(folder)
        _take_place(temporary, target)
        flush_folder(os.fspath(parent))
    finally:
        _remove(temporary)


def copy_file(
    source: Path,
    target: Path,
    done: Callable[[int], None] = lambda count: None,
    *,
    flush: bool = True,
) -> None:
    """Copy the bytes and permissions of a file; symbolic links are followed.

    Args:
        source: A regular file.
        target: A path that is not there yet.
        done: Told the number of bytes after each piece.
        flush: Wait until they are on the disk; a caller that writes on flushes later.
    """
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
        for count in _copied(old, new, os.fstat(old.fileno()).st_size):
            done(count)
        if flush:
            os.fsync(new.fileno())
    shutil.copymode(source, target)


def _copied(old: BinaryIO, new: BinaryIO, size: int) -> Iterator[int]:
    """Copy ``size`` bytes piece by piece, by the kernel if it can."""
    left = size
    copy = getattr(os, "copy_file_range", None)
    while left and copy is not None:
        try:
            count = copy(old.fileno(), new.fileno(), min(left, _CHUNK))
        except OSError:  # another file system, or one that cannot
            break
        if not count:
            break
        left -= count
        yield count
    old.seek(size - left)
    new.seek(size - left)
    while piece := old.read(2**20):
        new.write(piece)
        yield len(piece)


def _take_place(new: Path, target: Path) -> None:
    """Put ``new`` at ``target``; an old folder there is exchanged in one step where Linux can."""
    if not (new.is_dir() and target.is_dir()):
        os.replace(new, target)
        return
    if _exchange(new, target):
        return  # the old one stands at the temporary path now, and is removed there
    aside = new.with_suffix(".old")
    os.rename(target, aside)
    os.rename(new, target)
    _remove(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's ``renameat2`` with ``RENAME_EXCHANGE``: swap two paths in one step."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(call(here, os.fsencode(a), here, os.fsencode(b), exchange)) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        path.unlink()
