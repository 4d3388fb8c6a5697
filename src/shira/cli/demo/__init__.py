# SPDX-License-Identifier: Apache-2.0
"""`shira demo`: adapt a real pretrained model twice, and prove what the library promises."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shira.cli.demo.task import Task

# Tasks, the default first; each is a module of that name, with `Demo` and `model_path`.
TASKS = ("language", "classification")
EXAMPLES = (
    "shira demo                            # a language model: about five minutes on two cores",
    "shira demo --task classification      # an encoder: about three minutes",
    "shira demo --output /tmp/demo --seed 1",
    "shira demo --density 0.01 --steps 60  # half the entries, twice the steps",
    "shira demo --quick                    # all the proofs, nothing learnt",
)


def command(
    output: Annotated[
        Path,
        typer.Option(help="Folder for adapters, texts and figures: a new one, or the demo's own."),
    ] = Path("shira-demo"),
    task: Annotated[str, typer.Option(help=f"One of: {', '.join(TASKS)}.")] = TASKS[0],
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

    By default a language model (SmolLM2, 135 million parameters) learns to document functions, and
    to talk like a pirate: its answers are shown before, with each adapter, and after. With --task
    classification a sentence encoder learns which library wrote a docstring, and what kind of thing
    it documents. All texts are made of the docstrings of the installed libraries, with no source
    file on both sides of the split.

    A second process then reloads both adapters from disk and proves that they predict the same,
    switches between them, and proves that every base weight is bit for bit what it was.

    Exits with status 1 if a proof fails.
    """
    from shira.cli.options import one_of
    from shira.cli.output import needed_for, no_accelerator_note, offline, share_cores

    one_of("--task", task, TASKS)
    given = {
        "seed": seed,
        "density": density,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    offline()
    share_cores()
    no_accelerator_note()
    with needed_for("the demo", "'shira[demo]'"):
        import peft  # noqa: F401  if it is missing, that is said first

        from shira.cli.demo.run import run_demo
    chosen = {name: value for name, value in given.items() if value is not None}
    module = importlib.import_module(f"{__name__}.{task}")
    settings: Task = module.Demo(**{**(module.Demo.QUICK if quick else {}), **chosen})
    if not run_demo(output, task, settings):
        raise typer.Exit(1)
