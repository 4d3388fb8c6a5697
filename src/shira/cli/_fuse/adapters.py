# SPDX-License-Identifier: Apache-2.0
"""Adapters named on the command line: ``PATH`` or ``PATH=WEIGHT``, read, and given short names."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from shira.cli.progress import track
from shira.delta import Adapter
from shira.errors import ConfigError


def split_weight(argument: str) -> tuple[str, float | None]:
    """``"a=0.5"`` as path and weight; the weight is None where there is none.

    A path that exists is taken whole, whatever is in it.

    Raises:
        ConfigError: If what follows the last ``=`` is no number.
    """
    path, sign, weight = argument.rpartition("=")
    if not sign or Path(argument).exists():
        return argument, None
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(
            f"{argument!r}: there is no such file or folder, and {weight!r} is no weight; write "
            "PATH or PATH=0.5"
        ) from None


def read_all(paths: Sequence[str], base: str | None) -> list[Adapter]:
    """Read adapters, telling how far it is.

    Args:
        paths: Folders or files.
        base: Where the shapes of the base's weights are known from, for files that lack them.

    Raises:
        FileNotFoundError: If one is not there; found out before any is read.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", path)
    return [Adapter.load(path, base=base) for path in track(paths, "reading")]


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths, as many parts of each as it takes to tell them apart.

    Paths that are the same get a number.
    """
    parts = [Path(path).resolve().parts for path in paths]
    most = max((len(part) for part in parts), default=1)
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, most + 1):
        if len(set(names)) == len(names):
            return names
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(part[-length:]) if name in twice else name
            for name, part in zip(names, parts, strict=True)
        ]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]
