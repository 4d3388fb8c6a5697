# SPDX-License-Identifier: Apache-2.0
"""The base model's checkpoint, opened to look values up in it: safetensors files and nothing else.

The checkpoint's names may lack a prefix that the model has, or have one more (``bert.encoder...``
is ``encoder...`` in an encoder's own file); a name matches one that ends like it, if only one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shira.errors import ConfigError, FileFormatError, WrongBaseError, did_you_mean


class Checkpoint:
    """Tensors of a base model on disk, by name.

    Args:
        path: A safetensors file, or a folder with one or more.

    Raises:
        FileFormatError: If there is no safetensors file, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, Path] = {}
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileFormatError(f"{path}: the folder has no .safetensors file to compare with")
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise FileFormatError(f"{file}: not a safetensors file: {error}") from error

    def key(self, parameter: str) -> str:
        """The checkpoint's own name of a parameter of the model.

        Raises:
            WrongBaseError: If it has none, or several could be meant.
        """
        if parameter in self._files:
            return parameter
        near = [
            key
            for key in self._files
            if parameter.endswith(f".{key}") or key.endswith(f".{parameter}")
        ]
        if len(near) == 1:
            return near[0]
        if near:
            raise WrongBaseError(f"{self.path}: {parameter!r} could be any of {', '.join(near)}")
        raise WrongBaseError(
            f"{self.path}: there is no {parameter!r}, which the adapter changes; is this its base?"
            f"{did_you_mean(parameter, self._files)}"
        )

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading it."""
        key = self.key(parameter)
        with safe_open(self._files[key], framework="pt") as opened:
            return tuple(opened.get_slice(key).get_shape())

    def values(self, parameter: str, indices: Tensor) -> Tensor:
        """``(k,)`` values of a parameter at flat indices, in the checkpoint's dtype."""
        key = self.key(parameter)
        with safe_open(self._files[key], framework="pt") as opened:
            whole: Tensor = opened.get_tensor(key)
        return whole.reshape(-1)[indices.long()]

    def shapes(self, parameters: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
        """The shape of each of some parameters."""
        return {name: self.shape(name) for name in parameters}


def find_checkpoint(base: str) -> Checkpoint:
    """Open what ``--base`` names: a file, a folder, or a model on the Hugging Face hub.

    Raises:
        ConfigError: If there is nothing of that name.
        FileFormatError: If it is no safetensors checkpoint.
    """
    path = Path(base)
    return Checkpoint(path if path.exists() else _from_hub(base))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"--base {name!r}: no such file or folder") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors"]))
    except (OSError, ValueError) as error:  # all of the hub's errors are one or the other
        raise ConfigError(
            f"--base {name!r}: no such file or folder here, and the hub did not give a model of "
            f"that name ({type(error).__name__})"
        ) from error
