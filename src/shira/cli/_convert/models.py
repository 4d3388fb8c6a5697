# SPDX-License-Identifier: Apache-2.0
"""Where a model named on the command line is: a path, or the Hugging Face hub's cache."""

from __future__ import annotations

from pathlib import Path

from shira.errors import ConfigError


def find_model(name: str, option: str) -> Path:
    """The path of a checkpoint: itself, or the snapshot of a model on the hub.

    Args:
        name: A file, a folder, or a model on the hub.
        option: What the name was given as, for the message.

    Raises:
        ConfigError: If there is nothing of that name.
    """
    path = Path(name)
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"{option} {name!r}: no such file or folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{option} {name!r}: no such file or folder") from None
    try:
        skipped = ["*.bin", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot"]
        return Path(snapshot_download(name, ignore_patterns=skipped))
    except (OSError, ValueError) as error:  # all of the hub's errors are one or the other
        raise ConfigError(
            f"{option} {name!r}: no such file or folder here, and the hub did not give a model of "
            f"that name ({type(error).__name__})"
        ) from error
