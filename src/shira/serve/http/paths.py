# SPDX-License-Identifier: Apache-2.0
"""What a client may name: paths below one folder, and names that are safe to print."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shira.errors import AdapterError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class PathRefusedError(AdapterError):
    """A path of a client's that leads out of the folder of adapters, or cannot be one."""


def below(folder: Path, path: object) -> Path:
    """The real place of a client's path, which must lie below the folder.

    ``..`` and symbolic links are followed first; what counts is where the path leads.

    Args:
        folder: The folder of adapters.
        path: Relative to it, or absolute.

    Raises:
        PathRefusedError: If it leads elsewhere, is the folder itself, or is no path.
        FileNotFoundError: If nothing is there.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise PathRefusedError(f"a path is a string below the folder of adapters, not {path!r}")
    root = folder.resolve()
    try:
        real = (root / path).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise PathRefusedError(f"the path {path!r} cannot be followed") from error
    # The same answer whether there is something outside or not: nothing is told of it.
    if root not in real.parents:
        raise PathRefusedError(
            f"the path {path!r} does not lie below the folder of adapters; "
            "name adapters by their path inside it"
        )
    try:
        there = real.exists()
    except OSError as error:
        raise PathRefusedError(f"the path {path!r} cannot be followed") from error
    if not there:
        raise FileNotFoundError(f"there is no adapter at {path!r} in the folder of adapters")
    if real.is_dir():
        _check_links(root, real, path)
    return real


def _check_links(root: Path, folder: Path, path: str) -> None:
    """An adapter is a folder with files in it, which may be links, but not to the outside."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and root not in Path(entry.path).resolve().parents:
                raise PathRefusedError(
                    f"{entry.name!r} in {path!r} is a link out of the folder of adapters"
                )


def adapter_name(name: object) -> str:
    """A client's name for an adapter, checked.

    Raises:
        AdapterError: If it is not 1 to 128 letters, digits, ``. _ : -``, the first a letter or
            digit.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name) if len(repr(name)) < 150 else repr(name)[:150] + "..."
        raise AdapterError(
            "an adapter's name is 1 to 128 letters, digits or . _ : - and begins with a letter or "
            f"digit, unlike {shown}"
        )
    return name


def folder_of_adapters(text: str | None, variable: str) -> Path | None:
    """The folder that the server was told of, or None if it was told of none.

    Raises:
        ConfigError: If it is no folder.
    """
    if not text:
        return None
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{variable}={text} is no folder")
    return folder.resolve()
