# SPDX-License-Identifier: Apache-2.0
"""A base model's checkpoint on disk: safetensors in one file or several, known by their headers.

Which tensors there are, in which file, at which byte; no tensor is read here. The files that make
up a folder's checkpoint are those that transformers, or diffusers, would load from it:

1. the file, or index, that ``transformers_weights`` in ``config.json`` names;
2. ``model.safetensors``, else the files that ``model.safetensors.index.json`` lists;
3. the files that ``diffusion_pytorch_model.safetensors.index.json`` lists, else
   ``diffusion_pytorch_model.safetensors``;
4. the files that the only other index lists;
5. every safetensors file that is no adapter's, if no name occurs in two of them.

A name that is no path is looked for on the Hugging Face hub, as transformers does.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shira.checkpoints.conversion import Place, Places, places_of
from shira.errors import FileFormatError
from shira.store.header import Stored, open_tensors
from shira.store.json_text import open_regular, read_object

_INDEX = ".safetensors.index.json"
_STANDARD = (  # in the order in which their libraries look for them
    ("model.safetensors", f"model{_INDEX}"),
    (f"diffusion_pytorch_model{_INDEX}", "diffusion_pytorch_model.safetensors"),
)
_ADAPTERS = ("adapter_model.safetensors", "adapter.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_FORMATS = [*(f"*{kind}" for kind in _PICKLES), "*.h5", "*.msgpack", "*.onnx", "*.gguf"]
_CONFIG_LIMIT = 10_000_000  # bytes
_INDEX_LIMIT = 200_000_000  # bytes; 100 is about one entry


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: The folder, or the one file.
        files: The safetensors files that make it up.
        tensors: Where each tensor lies, by its name.
        config: What ``config.json`` beside them says; empty where there is none.
        index: The file that lists them, if one does.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    index: Path | None = None

    @cached_property
    def places(self) -> Places:
        """The places of the model's parameters, by the names that the module has for them."""
        return places_of(self.config, self.tensors)

    @cached_property
    def as_stored(self) -> Mapping[str, Place]:
        """The tensors as they are, by their own names."""
        return {key: Place(stored.shape, stored) for key, stored in self.tensors.items()}


def open_checkpoint(base: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    """Open a checkpoint: headers, index and config, no tensors.

    Args:
        base: A folder, one safetensors file, or the name of a model on the Hugging Face hub, whose
            files are downloaded unless they are in its cache. An open checkpoint is returned as it
            is.

    Raises:
        FileNotFoundError: If there is nothing of that name, or a file that the index lists is not
            there.
        FileFormatError: If there is no safetensors checkpoint or more than one, a file is damaged,
            two of them hold a tensor of one name, or the index does not fit the files.
    """
    if isinstance(base, Checkpoint):
        return base
    where = Path(base)
    if not where.exists():
        where = _from_hub(os.fspath(base))
    folder = where if where.is_dir() else where.parent
    config = _config_of(folder / "config.json")
    chosen = _chosen(where, config) if where.is_dir() else where
    index: Path | None = None
    placed: Mapping[str, str] = {}
    if chosen is None:
        files = tuple(sorted(f for f in where.glob("*.safetensors") if f.name not in _ADAPTERS))
        if not files:
            why = _why(where)
            raise FileFormatError(f"{where}: the folder has no safetensors checkpoint{why}")
    elif chosen.suffix in _PICKLES:
        raise FileFormatError(f"{where}: {_PICKLED}")
    elif chosen != where and chosen.name.endswith(_INDEX):
        index, placed = chosen, _read_index(chosen)
        files = tuple(where / name for name in sorted(set(placed.values())))
    else:
        files = (chosen,)
        index = None if chosen == where else _index_of(chosen)
    tensors: dict[str, Stored] = {}
    for path in files:
        with open_tensors(path) as file:
            for key in file.tensors:
                if key in tensors:
                    raise FileFormatError(
                        f"{where}: both {tensors[key].file.name} and {path.name} hold {key!r}; "
                        "give the path of one file"
                    )
            tensors.update(file.tensors)
    for key, name in placed.items():
        at = tensors[key].file.name if key in tensors else None
        if at != name:
            fault = "which lacks it" if at is None else f"but it is in {at}"
            raise FileFormatError(f"{where}: the index lists {key!r} in {name}, {fault}")
    return Checkpoint(where, files, tensors, config, index)


_PICKLED = (
    "a pickle, which can run code when it is read and is not read here. Write it as safetensors: "
    "load the model with from_pretrained and save it with save_pretrained"
)


def _from_hub(name: str) -> Path:
    """Return the local snapshot of a model on the hub."""
    nothing = "no such file or folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".safetensors"):
        raise FileNotFoundError(errno.ENOENT, nothing, name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        needs = f"{nothing} (a model of the hub needs huggingface_hub)"
        raise FileNotFoundError(errno.ENOENT, needs, name) from None
    try:
        return Path(snapshot_download(name, ignore_patterns=_OTHER_FORMATS))
    except (OSError, ValueError) as error:  # all of the hub's errors are one or the other
        said = f"the hub did not give a model of that name ({type(error).__name__})"
        raise FileNotFoundError(errno.ENOENT, f"{nothing} here, and {said}", name) from error


def _chosen(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Return the one file, or index, that makes up a folder's checkpoint; None if none does."""
    named = config.get("transformers_weights")
    if isinstance(named, str):
        if not named.endswith((".safetensors", _INDEX)) or named != os.path.basename(named):
            raise FileFormatError(
                f"{folder}: config.json says that the weights are {named!r}, which is no "
                "safetensors file or index in the folder"
            )
        return folder / named
    # lexists: a link into nowhere is a file that is missing, not one that was never there
    there = [
        next((folder / name for name in names if os.path.lexists(folder / name)), None)
        for names in _STANDARD
    ]
    standard = [file for file in there if file is not None]
    indices = standard or sorted(folder.glob(f"*{_INDEX}"))
    if len(indices) > 1:
        raise FileFormatError(
            f"{folder}: there are {len(indices)} checkpoints, "
            f"{', '.join(file.name for file in indices)}; give the path of one file, or keep "
            "it alone in a folder"
        )
    return indices[0] if indices else None


def _why(folder: Path) -> str:
    """Describe what a folder without a safetensors checkpoint holds instead, and what to do."""
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLES) and "model" in name]
    if pickled:
        return f"; its {pickled[0]} is {_PICKLED}"
    adapters = [name for name in names if name in _ADAPTERS]
    if adapters:
        return f": its {adapters[0]} is an adapter's; give the base model"
    parts = sorted({file.parent.name for file in folder.glob("*/*.safetensors")})
    if parts:
        return f"; its folders {', '.join(parts[:8])} have: give one of them"
    return ""


def _index_of(file: Path) -> Path | None:
    """Return the index beside a file that lists this file and no other, if there is one."""
    path = file.with_name(file.stem + _INDEX)
    try:
        return path if {*_read_index(path).values()} == {file.name} else None
    except (FileNotFoundError, FileFormatError):
        return None


def _read_index(path: Path) -> Mapping[str, str]:
    """Return the name of the file of each tensor."""
    placed = read_object(path, "index", _INDEX_LIMIT).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FileFormatError(f"{path}: weight_map maps the tensors' names to their files")
    for key, name in placed.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", "..", "."):
            raise FileFormatError(f"{path}: {key!r}: {name!r} is no file beside the index")
    return placed


def _config_of(file: Path) -> Mapping[str, Any]:
    """Return the config beside a checkpoint; empty if there is none.

    One that cannot be read is refused: it says which files are the checkpoint, and whether the
    output head is tied to the embedding.
    """
    if not file.exists():
        return {}
    try:
        with open_regular(file) as opened:
            config = json.loads(opened.read(_CONFIG_LIMIT))  # not ours, and may hold Infinity
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: the base's config cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{file}: the base's config is not a JSON object")
    return config
