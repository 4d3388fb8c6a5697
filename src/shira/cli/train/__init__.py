# SPDX-License-Identifier: Apache-2.0
"""`shira train`: train an adapter on a user's own files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from shira.cli.train.options import GROUPS, fields, resolve

EXAMPLES = (
    "shira train --model bert-base-uncased --task text-classification --train-file train.csv"
    " --eval-file dev.csv --output adapter",
    "shira train --model gpt2 --task causal-lm --train-file book.txt --density 0.01"
    " --learning-rate 2e-3 --output adapter",
    "shira train --config job.yaml --seed 7 --output adapter-7   # the command line wins",
    "shira train --config job.yaml --mask-type snip --calibration-samples 128",
    "shira train --config job.yaml --resume last",
    "torchrun --nproc-per-node 2 -m shira train --config job.yaml",
)


def command(config: Path | None = None, **given: Any) -> None:
    """Train a SHiRA adapter on your own files.

    Writes to the output folder: the adapter in PEFT's format, README.md (a model card), figures and
    losses (metrics.json), a plot of the loss (loss.png), all options (train.yaml, to use with
    --config), and checkpoints to resume from.

    Classification takes a column of text and one of labels. A causal language model takes either a
    column of text, which becomes one run of blocks of --max-length tokens, or the columns prompt
    and completion, of which only the completion is learnt.
    """
    options = resolve(given, config)
    from shira.cli.train.run import run_training

    run_training(options)


def _signature() -> inspect.Signature:
    """Return one parameter for each option, None unless given, so that a file can be heard."""
    about = "YAML file of options; the command line wins over it."
    hints = {"config": Annotated[Path | None, typer.Option(help=about)]}
    group = ""
    for field, hint in fields():
        group = GROUPS.get(field.name, group)
        plain = field.default is None or field.default is False
        text = field.metadata["help"] + ("" if plain else f" (default {field.default})")
        option = typer.Option(help=text, rich_help_panel=group)
        hints[field.name] = Annotated[hint | None, option]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [inspect.Parameter(n, kind, default=None, annotation=hint) for n, hint in hints.items()]
    )


# The options are declared once, in `TrainOptions`; typer reads the signature made of them.
command.__signature__ = signature = _signature()  # type: ignore[attr-defined]
command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
