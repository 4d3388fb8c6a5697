# SPDX-License-Identifier: Apache-2.0
"""A copy of a checkpoint with some of its entries overwritten: what merging and unmerging share.

Files are copied whole and then patched at the entries alone, so headers, metadata, index and the
order of tensors stay as they are, and shards without an entry are plain copies. Everything else in
the folder comes along, but for other copies of the same weights, which would be the old ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from shira.checkpoints.entries import write_entries
from shira.checkpoints.opening import Checkpoint, Stored
from shira.convert.copying import copy_file
from shira.errors import ConfigError
from shira.store.atomic import replacing

Progress = Callable[[int, int], None]
"""Told the bytes that are done and those there are in all."""

# Other files that hold the weights: formats of other libraries anywhere, and beside the checkpoint
# also what could be loaded in its place. (Below it may stand further parts of a larger model.)
_ANYWHERE = ("consolidated*.pth", "*.onnx", "*.onnx_data", "*.gguf", "openvino_model*.bin")
_BESIDE = (
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model*.h5", "flax_model*.msgpack",
    "rust_model.ot", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
_HIDDEN = (".git", ".cache")


@dataclass(frozen=True)
class Edit:
    """New values for some entries of one tensor.

    Attributes:
        stored: The tensor, in the checkpoint that is copied.
        flat: ``(k,)`` increasing flat indices.
        values: ``(k,)`` in the tensor's dtype.
    """

    stored: Stored
    flat: Tensor
    values: Tensor


@dataclass(frozen=True)
class Written:
    """What a rewritten copy is made of.

    Attributes:
        patched: Files with an entry overwritten.
        copied: Files that are plain copies.
        left_out: Files that were not carried along: other copies of the weights, hidden folders.
        size: Bytes in all.
    """

    patched: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    size: int


def check_output(
    checkpoint: Checkpoint, output: str | os.PathLike[str], overwrite: bool, what: str = "output"
) -> Path:
    """Return the output's path, after making sure that what is there may be replaced.

    Raises:
        ConfigError: If it is there already and may not be overwritten, or is a folder of something
            else. (`check_outputs` keeps it apart from what is read.)
    """
    target = Path(os.path.abspath(output))
    if not (target.exists() or target.is_symlink()):
        return target
    if not overwrite:
        raise ConfigError(f"{what} {target} exists; overwrite it (--overwrite), or name another")
    if target.is_symlink() or target.is_dir() != checkpoint.path.is_dir():
        raise ConfigError(f"{what} {target} exists and is of another kind; name another")
    if target.is_dir() and any(target.iterdir()) and not any(target.glob("*.safetensors")):
        raise ConfigError(
            f"{what} {target} is a folder of something else (it holds no safetensors file), and is "
            "not overwritten; name another"
        )
    return target


def rewrite(
    checkpoint: Checkpoint,
    edits: Sequence[Edit],
    output: Path,
    progress: Progress | None = None,
    last: Callable[[], None] = lambda: None,
) -> Written:
    """Write a copy with the edits made, in the place of whatever is at ``output``.

    Args:
        checkpoint: What to copy.
        edits: At most one a tensor.
        output: From `check_output`; a folder if the checkpoint is one, else a file.
        progress: Told of each piece.
        last: Called when the copy is complete, right before it takes its place.

    Raises:
        OSError: If the disk is full and the like; nothing has changed then.
    """
    by_file: dict[Path, list[Edit]] = {}
    for edit in edits:
        if edit.flat.numel():
            by_file.setdefault(edit.stored.file, []).append(edit)
    if not checkpoint.path.is_dir():
        files: Mapping[Path, str] = {checkpoint.path: ""}
        left_out: list[str] = []
    else:
        files, left_out = _files_of(checkpoint)
    total = sum(source.stat().st_size for source in files)
    count = 0

    def done(size: int) -> None:
        nonlocal count
        count += size
        if progress is not None:
            progress(count, total)

    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, folder=checkpoint.path.is_dir()) as temporary:
        for source, name in files.items():
            target = temporary / name if name else temporary
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, target, done, flush=source not in by_file)
            if source in by_file:
                _patch(target, by_file[source])
        last()
    patched = [name or source.name for source, name in files.items() if source in by_file]
    plain = [name or source.name for source, name in files.items() if source not in by_file]
    return Written(tuple(patched), tuple(plain), tuple(left_out), total)


def _patch(path: Path, edits: Sequence[Edit]) -> None:
    mode = path.stat().st_mode
    path.chmod(mode | 0o600)  # files of a cache may be read-only
    with open(path, "r+b", buffering=0) as file:
        for edit in edits:
            write_entries(file, edit.stored, edit.flat, edit.values)
        os.fsync(file.fileno())
    path.chmod(mode)


def _files_of(checkpoint: Checkpoint) -> tuple[Mapping[Path, str], list[str]]:
    """Each file of the folder that comes along with its path in it, and what stays behind."""
    along: dict[Path, str] = {}
    behind: list[str] = []
    own = {*checkpoint.files, checkpoint.index}
    for path in _walk(checkpoint.path):
        name = path.relative_to(checkpoint.path).as_posix()
        if path in own or not _stays(path, at_top=path.parent == checkpoint.path):
            along[path] = name
        else:
            behind.append(name)
    return along, behind


def _stays(path: Path, at_top: bool) -> bool:
    """Whether a file is left behind: another copy of the weights, or nothing that can be copied."""
    if path.is_dir() or not path.is_file():
        return True
    return any(fnmatch(path.name, p) for p in (*_ANYWHERE, *(_BESIDE if at_top else ())))


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, and the folders that are not entered: hidden ones and links."""
    for here, folders, files in os.walk(folder):
        stays = [n for n in folders if n in _HIDDEN or os.path.islink(os.path.join(here, n))]
        folders[:] = sorted(set(folders) - set(stays))
        yield from (Path(here, name) for name in sorted(files) + stays)
