# SPDX-License-Identifier: Apache-2.0
"""Saving an adapter as the options ``--format``, ``--dtype`` and ``--overwrite`` say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira.errors import ConfigError, did_you_mean
from shira.store import FORMATS

if TYPE_CHECKING:
    import torch

    from shira.adapter import Adapter

_DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of an option ``--dtype``; None for none.

    Raises:
        ConfigError: If values are stored in no dtype of that name.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(
            f"--dtype is one of {', '.join(_DTYPES)}, not {name!r}.{did_you_mean(name, _DTYPES)}"
        )
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def check_new(path: Path, overwrite: bool) -> None:
    """Refuse to write over what is there, unless asked to.

    Raises:
        ConfigError: If there is something.
    """
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"--output {path} exists; overwrite it (--overwrite), or name another")


def check_format(name: str, others: tuple[str, ...] = ()) -> None:
    """Refuse a format that there is not.

    Raises:
        ConfigError: If it is none of the formats of adapters nor of ``others``.
    """
    known = (*FORMATS, *others)
    if name not in known:
        raise ConfigError(
            f"--format is one of {', '.join(known)}, not {name!r}.{did_you_mean(name, known)}"
        )


def keeps_values(adapter: Adapter, dtype: str | None) -> bool:
    """Whether an adapter's values are stored in a dtype that holds them as they are."""
    stored = dtype_named(dtype)
    if stored is None:
        return True
    return stored.is_floating_point and all(
        bool((delta.values.to(stored) == delta.values).all()) for delta in adapter.values()
    )


def save(adapter: Adapter, path: Path, format: str, dtype: str | None) -> dict[str, Any]:
    """Write the adapter; what was written, in what JSON can hold."""
    options: dict[str, Any] = {"format": format, "dtype": dtype_named(dtype)}
    if format == "compact":
        path.parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path, **options)
    return {"output": str(path), "format": format, "bytes": size_of(path)}


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
