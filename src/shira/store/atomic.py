# SPDX-License-Identifier: Apache-2.0
"""Writing a file so that whoever looks finds the old one or the new one, never half of one.

The bytes go to a temporary file in the same folder, which is flushed to the disk and then takes the
place of the old one in a single step of the file system; at last the folder is flushed, so that the
step itself survives a power cut. Uses the standard library only.
"""

from __future__ import annotations

import os
import secrets


def write_atomically(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Put ``data`` at ``path``, replacing what is there as a whole.

    A killed process can leave a temporary ``.<name>.<random>.tmp`` behind, which nothing reads.
    A symbolic link stays, and what it points to is replaced; permissions of an old file are kept.

    Args:
        path: The file. Its folder exists.
        *data: All of its new content, in one part or more.

    Raises:
        OSError: If it cannot be written; the old file is still there.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(temporary, os.stat(target).st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    _flush_folder(folder)


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends without it


def _flush_folder(folder: str) -> None:
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
