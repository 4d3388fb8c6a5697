# SPDX-License-Identifier: Apache-2.0
"""Copying a file's bytes and permissions.

The kernel copies the bytes where it can (and shares them where the file system can), so no memory
is needed; else they go through a small buffer. Standard library only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_CHUNK = 2**25  # bytes that are copied between two reports of progress


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
        target: The file to write.
        done: Told the number of bytes after each piece.
        flush: Wait until they are on the disk; a caller that writes on flushes later.
    """
    with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
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
