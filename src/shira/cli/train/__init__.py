# SPDX-License-Identifier: Apache-2.0
"""`shira train`: train an adapter on a user's own files."""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from shira.cli.output import console, needed_for, no_accelerator_note, quieten
from shira.cli.progress import say
from shira.cli.train.options import GROUPS, TrainOptions, fields, resolve

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
    _train(resolve(given, config))


def _train(options: TrainOptions) -> None:
    """Train as the options say, and write everything to the output folder."""
    from shira.cli.train import checkpoints
    from shira.cli.train import model as models
    from shira.cli.train.data import load_data
    from shira.cli.train.outputs import write_outputs

    output = Path(options.output or "")
    checkpoint = checkpoints.find_checkpoint(output, options.resume)
    checkpoints.check_output(output, options, checkpoint)
    no_accelerator_note()
    for package in ("transformers", "peft", "accelerate", "datasets", "matplotlib"):
        with needed_for("training", "'shira[train]'"):
            __import__(package)
    import torch

    from shira import PeftModel
    from shira.cli.train.trainer import fit, make_trainer, training_arguments, writing

    quieten(warnings_too=False)
    models.adapter_config(options)  # refuses what it cannot be
    arguments = training_arguments(options, output / checkpoints.CHECKPOINTS)
    record = checkpoints.record_of(options, arguments.world_size)
    if checkpoint is not None:
        checkpoints.check_same(checkpoint, record)
    tokenizer = models.load_tokenizer(options)
    say(f"reading {options.train_file}")
    with arguments.main_process_first(desc="reading the data"):
        data = load_data(options, tokenizer)
    base = models.load_base(options, data.labels, tokenizer.pad_token_id)
    models.check_modules(base, options)
    models.check_fits(base, options, data)
    total = sum(parameter.numel() for parameter in base.parameters())
    if checkpoint is None:
        model = models.adapt(base, options, data, tokenizer, arguments.device)
    else:
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)

    since = checkpoints.started(checkpoint)
    made = [folder for folder in (output / checkpoints.CHECKPOINTS, output) if not folder.exists()]
    note = partial(checkpoints.write_record, record=record, started=since)
    trainer = make_trainer(model, options, data, tokenizer, arguments, after_saving=note)
    try:
        result = fit(trainer, total=total, checkpoint=checkpoint)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # with a checkpoint in it, it stays
                folder.rmdir()
        raise
    first = trainer.is_world_process_zero()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # whose threads abort a process that ends first
    if not first:
        return
    with writing("the adapter", output):
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output)
    write_outputs(output, options, data, result, model.peft_config["default"])
    out = console()
    for when, figures in (("before", result.before), ("after", result.after)):
        if figures:
            shown = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if k != "epoch")
            out.print(f"{when}: {shown}")
    out.print(
        f"{result.steps} steps, {result.seconds:.0f} s, {result.trained:,} of {result.total:,} "
        f"parameters trained ({result.trained / result.total:.2%})"
    )
    say(f"adapter, model card and figures are in {output}")


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
