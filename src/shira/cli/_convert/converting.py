# SPDX-License-Identifier: Apache-2.0
"""What ``shira convert`` does: which conversion is meant, and whether its options fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shira.adapter import Adapter
from shira.checkpoints import Checkpoint, open_checkpoint
from shira.cli._convert import tables
from shira.cli._convert.progress import following
from shira.cli._convert.saving import check_format, check_new, dtype_named, save, size_of
from shira.cli.console import console, megabytes
from shira.convert import (
    from_lora,
    is_lora,
    save_patches,
    to_patches,
)
from shira.errors import ConfigError
from shira.store.outputs import check_outputs

Shown = tuple[dict[str, Any], Callable[[], None]]
"""What was done, in what JSON can hold, and a function that prints it for people."""


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    source: Path
    output: Path
    to: str
    dtype: str | None
    base: str | None
    density: float | None
    r: int | None
    everywhere: bool
    scale: float
    check_base: bool
    overwrite: bool


def run(request: Request) -> Shown:
    """Convert.

    Raises:
        FileNotFoundError: If there is nothing at the source.
        ConfigError: If options do not go together.
    """
    check_outputs({"--output": request.output}, [request.source], [request.base])
    check_format(request.to, ("patch",))
    check_new(request.output, request.overwrite)
    dtype_named(request.dtype)
    base = None if request.base is None else open_checkpoint(request.base)
    if not request.source.exists():
        raise FileNotFoundError(2, "no such file or folder", str(request.source))
    lora = is_lora(request.source)
    _check_options(request, lora)
    if not lora:
        adapter = Adapter.load(request.source, base=base)
        return _saved(request, adapter, base)
    with following("multiplying, million entries") as progress:
        told = from_lora(
            request.source,
            base=base,
            density=request.density,
            r=request.r,
            everywhere=request.everywhere,
            progress=progress,
        )
    saved, _ = _saved(request, told.adapter, base)
    return {**saved, **told.as_json()}, lambda: tables.from_lora(told, saved)


def _check_options(request: Request, lora: bool) -> None:
    if not lora and (request.density is not None or request.r is not None or request.everywhere):
        raise ConfigError(
            f"{request.source} is no LoRA, and --density, --r and --everywhere are for a LoRA"
        )
    if request.to == "patch":
        if request.base is None:
            raise ConfigError("a patch holds replacement values, so it needs --base")
        if request.dtype is not None:
            raise ConfigError("a patch has the base's dtype, so --dtype is not for it")
    elif request.scale != 1.0 or not request.check_base:
        raise ConfigError("--scale and --no-check-base are for --format patch")


def _saved(request: Request, adapter: Adapter, base: Checkpoint | None) -> Shown:
    if request.to == "patch":
        assert base is not None  # checked
        patches = to_patches(adapter, base, scale=request.scale, check_base=request.check_base)
        save_patches(patches, request.output)
        size = size_of(request.output)
        saved: dict[str, Any] = {
            "output": str(request.output),
            "format": "patch",
            "bytes": size,
        }
    else:
        saved = save(adapter, request.output, request.to, request.dtype)
    saved |= {"parameters": len(adapter), "nnz": adapter.nnz, "density": adapter.density}
    saved["whole_tensors"] = list(adapter.tensors)
    sparse = saved["bytes"] - sum(tensor.nbytes for tensor in adapter.tensors.values())
    lines = {
        "output": f"{saved['output']}, {saved['format']}, {megabytes(saved['bytes'])}",
        "entries": f"{adapter.nnz:,} in {len(adapter)} weights, density {adapter.density:.2%}",
        "size": f"{sparse / max(adapter.nnz, 1):.2f} bytes an entry",
        **tables.whole_tensors(adapter),
    }
    return saved, lambda: console().print(tables.summary("Converted", lines))
