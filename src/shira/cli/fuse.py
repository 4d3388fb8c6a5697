# SPDX-License-Identifier: Apache-2.0
"""`shira fuse`: several adapters made one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shira.cli import options
from shira.cli.convert import save
from shira.cli.output import print_json, write
from shira.cli.progress import Steps
from shira.errors import ConfigError

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
    output: Annotated[Path, options.output("Where the fused adapter goes.")],
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
            "has. Without it, all that have one have to agree, at weight 1."
        ),
    ] = None,
    base: options.BaseForShapes = None,
    check_base: options.CheckSameBase = True,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="compact or peft; of the output's name if not given."),
    ] = None,
    dtype: options.Dtype = None,
    fill: Annotated[
        bool,
        typer.Option(
            "--fill",
            help="Fill up with zeros to r (m + n) entries in every weight: PEFT's own SHiRA loads "
            "nothing else.",
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
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
    from shira.cli.several import read_all, short_names
    from shira.fusing import fill_to_rank, fuse
    from shira.store.atomic import check_outputs
    from shira.support import matrix_shape

    paths, weights = zip(*map(split_weight, adapters), strict=True)
    check_outputs({"--output": output}, paths, [base])
    options.check_new(output, overwrite, empty_folder=False)
    options.dtype_named(dtype, options.FLOATS)
    names = short_names(paths)
    named = dict(zip(map(os.path.realpath, paths), names, strict=True))
    if whole is not None and os.path.realpath(whole) not in named:
        raise ConfigError(f"--whole {whole} is no adapter here; name one of {', '.join(paths)}")
    read = read_all(paths, base)
    with Steps("fusing") as steps:
        fused = fuse(
            read,
            weights,
            method,
            density=density,
            k=k,
            epsilon=epsilon,
            majority_sign_method=majority_sign_method,
            seed=seed,
            whole=None if whole is None else named[os.path.realpath(whole)],
            check_base=check_base,
            names=names,
            progress=steps.tell,
        )
    if fill:
        r, fused = fill_to_rank(fused)
        for name, delta in fused.items():
            if delta.nnz != r * sum(matrix_shape(delta.support.shape)):
                raise ConfigError(
                    f"--fill: {output} would have {delta.nnz} entries in {name!r} of shape "
                    f"{delta.support.shape}, and no r has room for them all in every weight as "
                    "r (m + n); fuse fewer entries (--method magnitude --k), or leave out --fill"
                )
    save(fused, output, file_format or "compact", dtype)
    if as_json:
        print_json(
            {
                "output": str(output),
                "nnz": fused.nnz,
                "density": fused.density,
                "parameters": len(fused),
                "whole_tensors": list(fused.tensors),
                "fused": fused.metadata.get("fused"),
            }
        )
        return
    entries = sum(adapter.nnz for adapter in read)
    write(
        f"{output}: {fused.nnz:,} entries in {len(fused)} weights, density {fused.density:.2%}, "
        f"by {method} from {len(read)} adapters of {entries:,} entries together"
    )
    if fused.tensors:
        write(f"whole tensors, carried as they are: {', '.join(fused.tensors)}")


def split_weight(argument: str) -> tuple[str, float]:
    """Split ``"a=0.5"`` into path and weight, 1 if not given; a path that exists is all path."""
    path, sign, weight = argument.rpartition("=")
    if not sign or Path(argument).exists():
        return argument, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(
            f"{argument!r}: there is no such file or folder, and {weight!r} is no weight; write "
            "PATH or PATH=0.5"
        ) from None
