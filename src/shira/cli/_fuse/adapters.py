# SPDX-License-Identifier: Apache-2.0
"""Adapters named on the command line: ``PATH`` or ``PATH=WEIGHT``, read, and given short names."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from shira.adapter import Adapter
from shira.checkpoints import open_checkpoint
from shira.cli.progress import track
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
        base: The base model's checkpoint, which tells the shapes for files that lack them.

    Raises:
        FileNotFoundError: If one is not there; found out before any is read.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", path)
    checkpoint = None if base is None else open_checkpoint(base)
    return [Adapter.load(path, base=checkpoint) for path in track(paths, "reading")]


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths, as many parts of each as it takes to tell them apart.

    Paths that are the same get a number.
    """
    real = [Path(path).resolve() for path in paths]
    shown = dict(zip(dict.fromkeys(real), _ends(list(dict.fromkeys(real))), strict=True))
    return [
        shown[path] if real.count(path) == 1 else f"{shown[path]} ({real[:at].count(path) + 1})"
        for at, path in enumerate(real)
    ]


def _ends(paths: Sequence[Path]) -> list[str]:
    """Of paths that all differ."""
    names = [path.name or str(path) for path in paths]
    length = 1
    while len(set(names)) < len(names):
        length += 1
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path.parts[-length:]) if name in twice else name
            for name, path in zip(names, paths, strict=True)
        ]
    return names
