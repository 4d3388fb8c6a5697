# SPDX-License-Identifier: Apache-2.0
"""`shira report`: everything that can be seen of adapters, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira report adapter",
    "shira report adapter --base ./my-model -o adapter.html",
    "shira report poems code law -o three.html",
    "shira report poems code --fast",
)


def command(
    adapters: Annotated[
        list[Path], typer.Argument(help="The adapters: folders or files.", metavar="ADAPTER...")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    base: Annotated[
        str | None,
        typer.Option(
            help="Their base model: a safetensors file, a folder with some, or a name on the hub. "
            "Tells how many deltas bfloat16 loses, and the shapes of weights where an adapter "
            "does not record them."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Leave out ranks, AWOM and AWOR, which take the longer time."),
    ] = False,
    check_base: Annotated[
        bool,
        typer.Option(
            "--check-base/--no-check-base", help="Refuse adapters of different base models."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of estimates that draw.")] = 0,
) -> None:
    """Write one HTML page that shows adapters.

    Summary, values, ranks, where in each weight the entries are, how the adapters overlap, deltas
    that bfloat16 loses (with --base), and the training curve if metrics.json of shira train or
    trainer_state.json lies beside an adapter. The page holds all it needs: it opens without a
    network, on a phone or a desktop, light or dark.

    Exit status 2: an adapter cannot be read, or the adapters do not belong together.
    """
    from shira.checkpoints import open_checkpoint
    from shira.cli._report.writing import write_report
    from shira.cli.output import write

    write_report(
        adapters,
        output,
        None if base is None else open_checkpoint(base),
        fast=fast,
        seed=seed,
        check_base=check_base,
    )
    write(f"{output}: {len(adapters)} adapter{'s' if len(adapters) > 1 else ''}")
