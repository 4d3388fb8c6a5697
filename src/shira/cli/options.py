# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, each declared once, and the checks of what they are given.

A command annotates its parameters with these; an option whose help differs from command to command
is a function of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shira.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

_BASE = "a safetensors file, a folder with some, or a name on the hub."
FLOATS = ("float32", "bfloat16", "float16", "float64")
"""Names of the floating point dtypes of stored values."""


def output(help: str) -> Any:
    """Return the option for where the result goes."""
    return typer.Option("--output", "-o", help=help)


def base(help: str = "") -> Any:
    """Return the option for the base model, and what it is needed for."""
    return typer.Option(help=f"The base model: {_BASE} {help}".rstrip())


AdapterPath = Annotated[Path, typer.Argument(help="The adapter: a folder, or its file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, with all details.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that is there already.")
]
CheckBase = Annotated[
    bool,
    typer.Option(
        "--check-base/--no-check-base",
        help="Refuse a base without the values that the adapter was trained on.",
    ),
]
CheckSameBase = Annotated[
    bool,
    typer.Option("--check-base/--no-check-base", help="Refuse adapters of different base models."),
]
BaseForShapes = Annotated[
    str | None,
    base("Needed for adapters that do not record the shapes of its weights, as PEFT's own do not."),
]
Seed = Annotated[int, typer.Option(help="Seed of estimates that draw at random.")]
Scale = Annotated[float, typer.Option(help="Factor on the deltas.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype of the stored values: float32, ...")]
Density = Annotated[
    float | None, typer.Option(help="Keep at most this share of each weight's entries.")
]
Rank = Annotated[
    int | None,
    typer.Option("--r", help="Keep at most r (m + n) entries of an m x n weight, as a LoRA has."),
]
Everywhere = Annotated[
    bool, typer.Option("--everywhere", help="Spend the budgets on the largest of all weights.")
]


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """Return the value of an option that has a few; refuse another."""
    known = tuple(known)
    if value not in known:
        raise ConfigError(
            f"{option} is one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}"
        )
    return value


def dtype_named(name: str | None, known: Iterable[str] = (*FLOATS, "int8")) -> torch.dtype | None:
    """Return the dtype that ``--dtype`` names; None for none."""
    if name is None:
        return None
    one_of("--dtype", name, known)
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def check_new(path: Path, overwrite: bool, *, empty_folder: bool = True) -> None:
    """Refuse to write over what is there, unless asked to or, by default, in an empty folder."""
    empty = empty_folder and path.is_dir() and not any(path.iterdir())
    if path.exists() and not overwrite and not empty:
        raise ConfigError(f"--output {path} exists; overwrite it (--overwrite), or name another")


def check_paths(paths: Iterable[str | Path]) -> None:
    """Raise FileNotFoundError, before any path is read, if there is nothing at one."""
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(2, "no such file or folder", str(path))
