# SPDX-License-Identifier: Apache-2.0
"""Check what clients name: paths below one folder, and names that are safe to print."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shira.errors import AdapterError, ConfigError

_LONGEST = 4096  # characters of a path
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class PathRefusedError(AdapterError):
    """A path of a client's that leads out of the folder of adapters."""


class NameTakenError(AdapterError):
    """A name that another adapter or the base model has already."""


def below(folder: Path, path: object) -> Path:
    """Return the real place of a client's path, relative or absolute, if it lies below the folder.

    ``..`` and symbolic links are followed first; what counts is where the path leads.
    `PathRefusedError` if it leads elsewhere, or is the folder itself.
    """
    if not isinstance(path, str) or not path or len(path) > _LONGEST:
        raise AdapterError(
            f"a path is a text of 1 to {_LONGEST} characters, below the folder of adapters, not "
            f"{path!r:.100}"
        )
    try:
        path.encode()  # a lone surrogate may name a file, but cannot be told of in UTF-8
        root = folder.resolve()
        real = (root / path).resolve()
        # The same answer whether there is something outside or not: nothing is told of it.
        if root not in real.parents:
            raise PathRefusedError(
                f"the path {path!r} does not lie below the folder of adapters; "
                "name adapters by their path inside it"
            )
        if not real.exists():
            raise FileNotFoundError(f"there is no adapter at {path!r} in the folder of adapters")
        if real.is_dir():
            _check_links(root, real, path)
        return real
    except (AdapterError, FileNotFoundError):
        raise
    except (OSError, RuntimeError, ValueError) as error:  # loops, names too long, NUL
        raise AdapterError(f"the path {path!r:.300} cannot be followed") from error


def _check_links(root: Path, folder: Path, path: str) -> None:
    """An adapter is a folder with files in it, which may be links, but not to the outside."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and root not in Path(entry.path).resolve().parents:
                raise PathRefusedError(
                    f"{entry.name!r} in {path!r} is a link out of the folder of adapters"
                )


def adapter_name(name: object) -> str:
    """Check a client's name for an adapter, and return it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError(
            "an adapter's name is 1 to 128 letters, digits or . _ : - and begins with a letter or "
            f"digit, unlike {name!r:.150}"
        )
    return name


def folder_of_adapters(text: str | None, variable: str) -> Path | None:
    """Return the folder that the server was told of, or None if it was told of none."""
    if not text:
        return None
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{variable}={text} is no folder")
    return folder.resolve()
