# SPDX-License-Identifier: Apache-2.0
"""Writing: what may take the place of what, and doing it in one step.

An output never takes the place of an input (`check_outputs`), nor of something that is no file.
Whoever looks at it finds the old one or the new one, never half of it.

The new one is made under a temporary name in the same folder, flushed to the disk, and takes the
place of the old one in a single step of the file system; at last the folder is flushed, so that the
step itself survives a power cut. Everything that shira writes goes through `replacing`.

A killed process leaves its temporary file behind, and the next one that writes to the same place
removes it. A file that another process is writing is never removed: whoever writes holds a lock
(``flock``) on it, which ends with the process.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from shira.errors import ConfigError
from shira.store.names import WEIGHTS_NAME

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]

_MADE_ANEW = (".png", ".html")  # pictures and pages, which are no input of any command


def write_atomically(path: AnyPath, *data: bytes | memoryview) -> None:
    """Put ``data``, one part after the other, at ``path``, replacing the file there as a whole.

    A symbolic link stays, and what it points to is replaced; permissions of an old file are kept.

    Raises:
        ConfigError: If there is something else than a regular file at ``path``.
        OSError: If it cannot be written; the old file is still there.
    """
    with replacing(os.path.realpath(path)) as temporary, open(temporary, "wb", 2**20) as file:
        file.writelines(data)


@contextmanager
def replacing(path: AnyPath, *, folder: bool = False) -> Iterator[Path]:
    """Give a new file or ``folder`` to fill, which takes the place of the old one at the end.

    If the block ends in an exception, the new one is removed and the old one stays. The files of a
    folder are flushed by whoever writes them.

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


def check_kind(path: AnyPath, *, folder: bool | None = False) -> None:
    """Refuse to replace what is of another kind: a pipe, a device, a folder by a file.

    ``folder`` tells whether a folder takes its place, or a file; None: either.
    """
    where = os.fspath(path)
    if os.path.isdir(path) and folder is False:
        raise ConfigError(f"{where}: is a folder, and cannot be replaced by a file")
    if os.path.isfile(path) and folder:
        raise ConfigError(f"{where}: is a file, and cannot be replaced by a folder")
    if os.path.exists(path) and not (os.path.isdir(path) or os.path.isfile(path)):
        raise ConfigError(
            f"{where}: is neither a file nor a folder but a pipe, a device or a socket, and is not "
            "replaced; name a file"
        )


def check_outputs(
    outputs: Mapping[str, AnyPath | None],
    inputs: Iterable[AnyPath | None] = (),
    checkpoints: Iterable[AnyPath | None] = (),
) -> None:
    """Refuse outputs that would overwrite an input, whatever links lead there.

    An output is refused if it is an input or holds one, if it is a file of an input folder (but for
    a picture or a page) or anything in the folder of a checkpoint, where loaders could take it for
    a part; and if it is another output or lies in one, or is a pipe, a device or a socket.

    Args:
        outputs: Files or folders by what they are called in messages, such as ``"--output"``. None
            is left out, here and below.
        inputs: Files and folders that are read: adapters, undo files, data.
        checkpoints: Folders and files of base models; names that are no path are left out.
    """
    given = {name: Path(path) for name, path in outputs.items() if path is not None}
    read = [_whole(Path(path)) for path in inputs if path is not None]
    models = [Path(path) for path in checkpoints if path is not None]
    for name, output in given.items():
        check_kind(output, folder=None)
        for source in filter(Path.exists, (*read, *models)):
            if cause := _overwriting(output, source, anything=source in models):
                raise ConfigError(f"{name} {output}: {cause}")
    for (name, output), (other, second) in itertools.combinations(given.items(), 2):
        if _same(output, second) or _inside(output, second) or _inside(second, output):
            raise ConfigError(f"{other} {second} and {name} {output} overlap; name another")


def _make(target: Path, folder: bool) -> tuple[Path, int]:
    """Make a temporary file or folder beside ``target``, and a descriptor that holds its lock."""
    while True:
        temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
        if folder:
            os.mkdir(temporary)
            descriptor = -1 if os.name == "nt" else os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if descriptor >= 0 and fcntl is not None:
            with suppress(OSError):  # of file systems without locks, where nothing is a leftover
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return temporary, descriptor
        os.close(descriptor)  # taken for a leftover between its making and its lock


def restore(target: Path) -> None:
    """Put back a folder that stands aside, as its writer was killed between two renames.

    Whoever writes does so (`replacing`); who reads what it is about to replace calls this first.
    """
    if fcntl is None or target.exists() or not target.parent.is_dir():
        return
    for path in _leftovers(target):
        if path.suffix == ".old" and not target.exists():
            os.rename(path, target)


def _leftovers(target: Path) -> list[Path]:
    left = re.compile(rf"\.{re.escape(target.name[:200])}\.[0-9a-f]{{16}}\.(tmp|old)")
    return [target.with_name(name) for name in os.listdir(target.parent) if left.fullmatch(name)]


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left behind where they wrote to ``target``."""
    if fcntl is None:
        return
    restore(target)
    for path in _leftovers(target):
        with suppress(OSError), ExitStack() as stack:  # being written, or not ours to remove
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)


def _take_place(new: Path, target: Path) -> None:
    """Put ``new`` at ``target``; an old folder there is exchanged in one step where Linux can."""
    if not (new.is_dir() and target.is_dir()):
        os.replace(new, target)
        return
    if _exchange(new, target):
        return  # the old one stands at the temporary path now, and is removed there
    aside = new.with_suffix(".old")
    try:
        os.rename(target, aside)
        os.rename(new, target)
    finally:
        if aside.exists() and not target.exists():
            os.rename(aside, target)  # failed, or interrupted, between the two
    _remove(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step, by Linux's ``renameat2``; return whether that was done."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(call(here, os.fsencode(a), here, os.fsencode(b), exchange)) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_folder(folder: AnyPath) -> None:
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _overwriting(output: Path, source: Path, *, anything: bool) -> str:
    """Return why an output would harm what is read, or ``anything`` in its folder; else nothing."""
    if _same(output, source):
        return "is read here and would be overwritten; name another"
    if _inside(source, output):
        return f"holds {source}, which is read here; name another"
    if not source.is_dir():
        return ""
    if _inside(output, source) and anything:
        return f"lies in the checkpoint {source}; put it beside"
    taken = output.exists() and output.suffix.lower() not in _MADE_ANEW
    if taken and (_inside(output, source) or any(_same(output, file) for file in source.iterdir())):
        return f"belongs to {source}, which is read here, and would be overwritten; name another"
    return ""


def _whole(path: Path) -> Path:
    """Return the folder of an adapter named by its weights file, as its config is read too."""
    return path.parent if path.name == WEIGHTS_NAME and not path.is_dir() else path


def _same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
