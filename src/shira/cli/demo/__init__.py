# SPDX-License-Identifier: Apache-2.0
"""`shira demo`: adapt a real pretrained model twice, and prove what the library promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "shira demo                            # about three minutes on two cores",
    "shira demo --output /tmp/demo --seed 1",
    "shira demo --density 0.01 --steps 400 # half the entries, twice the steps",
    "shira demo --quick                    # seconds: all the proofs, nothing learnt",
)


def command(
    output: Annotated[
        Path,
        typer.Option(help="Folder for adapters, texts, figures; nothing is written elsewhere."),
    ] = Path("shira-demo"),
    seed: Annotated[int | None, typer.Option(help="Seed of texts, masks, heads, batches.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries of each linear layer to train.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each run.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the adapter.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that it works, learns nothing.")
    ] = False,
) -> None:
    """Adapt a real pretrained model to two tasks, save, reload, switch and restore it.

    Makes two text classification tasks of the docstrings of the installed libraries (which library
    wrote it; what kind of thing it documents), with no source file on both sides of the split,
    and trains on each a head on the frozen encoder and then the same head with a SHiRA adapter.
    A second process then reloads both adapters from disk and proves that they predict the same,
    switches between them, and proves that every base weight is bit for bit what it was.

    Exits with status 1 if a proof fails.
    """
    from shira.cli.demo.settings import QUICK, Settings
    from shira.cli.output import needed_for, no_accelerator_note, offline, share_cores

    given = {
        "seed": seed,
        "density": density,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = Settings(**{**(QUICK if quick else {}), **chosen})  # type: ignore[arg-type]
    offline()
    share_cores()
    no_accelerator_note()
    with needed_for("the demo", "'shira[demo]'"):
        from shira.cli.demo.run import run_demo
    if not run_demo(output, settings):
        raise typer.Exit(1)
