# SPDX-License-Identifier: Apache-2.0
"""Replacing a file or a folder so that whoever looks finds the old one or the new one, never half.

The new one is made under a temporary name in the same folder, flushed to the disk, and takes the
place of the old one in a single step of the file system; at last the folder is flushed, so that the
step itself survives a power cut. Everything that shira writes goes through `replacing`.

A killed process leaves its temporary file behind, and the next one that writes to the same place
removes it. A file that another process is writing is never removed: whoever writes holds a lock
(``flock``) on it, which ends with the process. Uses the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shira.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Put ``data`` at ``path``, replacing what is there as a whole.

    A symbolic link stays, and what it points to is replaced; permissions of an old file are kept.

    Args:
        path: The file. Its folder exists.
        *data: All of its new content, in one part or more.

    Raises:
        ConfigError: If there is something else than a regular file at ``path``.
        OSError: If it cannot be written; the old file is still there.
    """
    with replacing(os.path.realpath(path)) as temporary, open(temporary, "wb") as file:
        file.writelines(data)


@contextmanager
def replacing(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """Give a new file or folder to fill, which takes the place of the old one at the end.

    If the block ends in an exception, the new one is removed and the old one stays.

    Args:
        path: What to replace. The folder that it is in exists.
        folder: Whether it is a folder. Its files are flushed by whoever writes them.

    Raises:
        ConfigError: If there is something of another kind at ``path``.
        OSError: If it cannot be written; the old one is still there.
    """
    target = Path(path)
    check_kind(target, folder=folder)
    _remove_leftovers(target)
    temporary, descriptor = _make(target, folder)
    try:
        yield temporary
        if folder:
            for inner, _, _ in os.walk(temporary, topdown=False):
                _flush_folder(inner)
        else:
            os.fsync(descriptor)
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
        if os.name == "nt":
            os.close(descriptor)  # Windows renames no open file
            descriptor = -1
        _take_place(temporary, target)
        _flush_folder(target.parent)
    finally:
        _remove(temporary)
        if descriptor >= 0:
            os.close(descriptor)


def check_kind(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Refuse to replace what is of another kind: a pipe, a device, a folder by a file.

    Raises:
        ConfigError: If there is something at ``path`` that is no regular file (no folder).
    """
    check_special(path)
    if os.path.isdir(path) and not folder:
        raise ConfigError(f"{os.fspath(path)}: is a folder, and cannot be replaced by a file")
    if os.path.isfile(path) and folder:
        raise ConfigError(f"{os.fspath(path)}: is a file, and cannot be replaced by a folder")


def check_special(path: str | os.PathLike[str]) -> None:
    """Refuse to replace a pipe, a device or a socket.

    Raises:
        ConfigError: If there is one at ``path``.
    """
    if os.path.exists(path) and not (os.path.isdir(path) or os.path.isfile(path)):
        raise ConfigError(
            f"{os.fspath(path)}: is neither a file nor a folder but a pipe, a device or a socket, "
            "and is not replaced; name a file"
        )


def _make(target: Path, folder: bool) -> tuple[Path, int]:
    """Make a temporary file or folder beside ``target``, and a descriptor that holds its lock."""
    while True:
        temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
        if folder:
            os.mkdir(temporary)
            descriptor = -1 if os.name == "nt" else os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if descriptor < 0 or fcntl is None:
            return temporary, descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, on which nothing is taken for a leftover
            return temporary, descriptor
        if os.path.exists(temporary):
            return temporary, descriptor
        os.close(descriptor)  # taken for a leftover between its making and its lock


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left behind where they wrote to ``target``."""
    if fcntl is None:
        return
    left = re.compile(rf"\.{re.escape(target.name[:200])}\.[0-9a-f]{{16}}\.(tmp|old)")
    for name in os.listdir(target.parent):
        if not left.fullmatch(name):
            continue
        path = target.with_name(name)
        if name.endswith(".old") and not target.exists():
            os.rename(path, target)  # killed between two renames
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except OSError:  # being written, or not ours to remove
            pass
        finally:
            os.close(descriptor)


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


def _flush_folder(folder: str | os.PathLike[str]) -> None:
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
