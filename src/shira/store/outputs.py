# SPDX-License-Identifier: Apache-2.0
"""The one rule of what may be written where: an output never takes the place of an input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from shira.errors import ConfigError
from shira.store.atomic import check_special
from shira.store.peft_format import WEIGHTS_NAME

AnyPath = str | os.PathLike[str]

_MADE_ANEW = (".png", ".html")  # pictures and pages, which are no input of any command


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
        outputs: Files or folders about to be written, by what they are called in messages, such as
            ``"--output"``. None is left out, here and below.
        inputs: Files and folders that are read: adapters, undo files, data.
        checkpoints: Folders and files of base models; names that are no path are left out.

    Raises:
        ConfigError: If one is refused; nothing is written or read.
    """
    given = {name: Path(path) for name, path in outputs.items() if path is not None}
    read = [_whole(Path(path)) for path in inputs if path is not None]
    models = [Path(path) for path in checkpoints if path is not None]
    for number, (name, output) in enumerate(given.items()):
        check_special(output)
        for source in (*read, *models):
            _check_input(f"{name} {output}", output, source, anything=source in models)
        for other, second in list(given.items())[:number]:
            if _same(output, second) or _inside(output, second) or _inside(second, output):
                raise ConfigError(f"{name} {output} and {other} {second} overlap; name another")


def _check_input(what: str, output: Path, source: Path, *, anything: bool) -> None:
    if not source.exists():
        return
    if _same(output, source):
        raise ConfigError(f"{what}: is read here and would be overwritten; name another")
    if _inside(source, output):
        raise ConfigError(f"{what}: holds {source}, which is read here; name another")
    if not source.is_dir():
        return
    if _inside(output, source) and anything:
        raise ConfigError(f"{what}: lies in the checkpoint {source}; put it beside")
    taken = output.exists() and output.suffix.lower() not in _MADE_ANEW
    if taken and (_inside(output, source) or any(_same(output, file) for file in source.iterdir())):
        raise ConfigError(
            f"{what}: belongs to {source}, which is read here, and would be overwritten; name "
            "another"
        )


def _whole(path: Path) -> Path:
    """Return the folder of an adapter named by its weights file, as its config is read too."""
    return path.parent if path.name == WEIGHTS_NAME and not path.is_dir() else path


def _same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
