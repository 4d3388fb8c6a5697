# SPDX-License-Identifier: Apache-2.0
"""`shira fuse`: several adapters made one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shira.adapter import Adapter

EXAMPLES = (
    "shira fuse poems code -o both",
    "shira fuse poems=0.7 code=0.3 -o both",
    "shira fuse poems code law --method ties --density 0.5 -o all",
    "shira fuse poems code --method dare --density 0.5 --seed 1 -o both",
    "shira fuse poems code --method magnitude --k 100000 -o both",
    "shira fuse poems code -o both --format peft --fill",
    "shira fuse poems=-1 -o unpoetic --dtype bfloat16",
    "shira fuse poems code -o both --whole poems   # two that trained different heads",
)


def command(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="The adapters: folders or files, each with a weight if you like: PATH=0.5.",
            metavar="ADAPTER[=WEIGHT]",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the fused adapter.")
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help="sum, mean, ties, dare, dare_ties, della, magnitude or magnitude_prune.",
        ),
    ] = "sum",
    density: Annotated[
        float | None,
        typer.Option(
            help="The share of its entries that each adapter keeps (ties, dare, dare_ties, della, "
            "magnitude_prune); for magnitude the density of the result."
        ),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Entries of the result (magnitude).")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Width of the range of probabilities (della).")
    ] = None,
    majority_sign_method: Annotated[
        str | None, typer.Option(help="How signs are elected: total or frequency (ties and kin).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the methods that drop at random; 0 if not given.")
    ] = None,
    whole: Annotated[
        Path | None,
        typer.Option(
            help="The adapter whose whole tensors (heads trained under modules_to_save) the result "
            "has. Without it, all that have one have to agree, at weight 1.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, for adapters that do not record the shapes of its weights, as "
            "those that PEFT itself has written: a safetensors file, a folder with some, or a name "
            "on the hub."
        ),
    ] = None,
    check_base: Annotated[
        bool,
        typer.Option(
            "--check-base/--no-check-base", help="Refuse adapters of different base models."
        ),
    ] = True,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="How to write it; as `Adapter.save` does if not given."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the stored values: float32, bfloat16 or float16.")
    ] = None,
    fill: Annotated[
        bool,
        typer.Option(
            "--fill",
            help="Fill up with zeros to r (m + n) entries in every weight: PEFT's own SHiRA loads "
            "nothing else.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made, as JSON.")] = False,
) -> None:
    """Fuse adapters into one, on the union of their entries.

    sum: weighted sum. mean: the same over the sum of the weights. ties: elect a sign at each entry
    and average what agrees. dare: drop entries at random and rescale the others, then sum.
    dare_ties: the same, then as ties. della: as dare_ties, but small entries are dropped more
    often. magnitude: sum, then keep the largest. magnitude_prune: keep the largest of each, then
    sum.

    Exit status 2: an adapter cannot be read, the adapters do not belong together, or an option
    is invalid; nothing is written.
    """
    from shira.cli._fuse.adapters import read_all, short_names, split_weight
    from shira.cli.output import write
    from shira.cli.progress import Steps
    from shira.errors import ConfigError
    from shira.fusing import fuse
    from shira.store.outputs import check_outputs

    pairs = [split_weight(argument) for argument in adapters]
    paths = [path for path, _ in pairs]
    check_outputs({"--output": output}, paths, [base])
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} exists; overwrite it (--overwrite), or name another")
    stored = _dtype(dtype)
    weights = [1.0 if weight is None else weight for _, weight in pairs]
    read, names = read_all(paths, base), short_names(paths)
    with Steps("fusing", len({name for adapter in read for name in adapter})) as steps:
        fused = fuse(
            read,
            weights,
            method,
            density=density,
            k=k,
            epsilon=epsilon,
            majority_sign_method=majority_sign_method,
            seed=seed,
            whole=None if whole is None else _named(whole, paths, names),
            check_base=check_base,
            names=names,
            progress=lambda done, total: steps.update(done),
        )
    if fill:
        fused = _filled(fused, output)
    options: dict[str, str] = {} if file_format is None else {"format": file_format}
    fused.save(output, dtype=stored, **options)  # type: ignore[arg-type]
    if as_json:
        made = {
            "output": str(output),
            "nnz": fused.nnz,
            "density": fused.density,
            "parameters": len(fused),
            "whole_tensors": list(fused.tensors),
            "fused": fused.metadata.get("fused"),
        }
        print(json.dumps(made, indent=2))
        return
    entries = sum(adapter.nnz for adapter in read)
    write(
        f"{output}: {fused.nnz:,} entries in {len(fused)} weights, density {fused.density:.2%}, "
        f"by {method} from {len(read)} adapters of {entries:,} entries together"
    )
    if fused.tensors:
        write(f"whole tensors, carried as they are: {', '.join(fused.tensors)}")


def _named(whole: Path, paths: Sequence[str], names: Sequence[str]) -> str:
    """Return the short name of the adapter at a path."""
    from shira.errors import ConfigError

    found = [
        n for n, path in zip(names, paths, strict=True) if Path(path).resolve() == whole.resolve()
    ]
    if len(found) != 1:
        raise ConfigError(
            f"--whole {whole} is {len(found)} of the adapters; name one of {', '.join(paths)}"
        )
    return found[0]


def _filled(fused: Adapter, output: Path) -> Adapter:
    from shira.errors import ConfigError
    from shira.fusing import fill_to_rank
    from shira.support import matrix_shape

    r, filled = fill_to_rank(fused)
    for name, delta in filled.items():
        if delta.nnz != r * sum(matrix_shape(delta.support.shape)):
            raise ConfigError(
                f"--fill: {output} would have {delta.nnz} entries in {name!r} of shape "
                f"{delta.support.shape}, and no r has room for them all in every weight as "
                "r (m + n); fuse fewer entries (--method magnitude --k), or leave out --fill"
            )
    return filled


def _dtype(name: str | None) -> object:
    from shira.errors import ConfigError, did_you_mean

    known = ("float32", "bfloat16", "float16", "float64")
    if name is None:
        return None
    if name not in known:
        raise ConfigError(
            f"--dtype {name}: there are {', '.join(known)}.{did_you_mean(name, known)}"
        )
    import torch

    return getattr(torch, name)
