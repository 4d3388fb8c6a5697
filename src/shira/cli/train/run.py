# SPDX-License-Identifier: Apache-2.0
"""A training run from options to files, on one process or under torchrun."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shira.cli.output import console, needed_for, no_accelerator_note, quieten
from shira.cli.progress import say
from shira.cli.train import checkpoints
from shira.cli.train import model as models
from shira.cli.train.data import load_data
from shira.cli.train.options import TrainOptions
from shira.cli.train.outputs import Result, write_outputs


def run_training(options: TrainOptions) -> None:
    """Train as the options say, and write everything to the output folder.

    Raises:
        ShiraError: For every mistake in the options or the data.
    """
    output = Path(options.output or "")
    checkpoint = checkpoints.find_checkpoint(output, options.resume)
    checkpoints.check_output(output, options, checkpoint)
    no_accelerator_note()
    for package in ("transformers", "peft", "accelerate", "datasets", "matplotlib"):
        with needed_for("training", "'shira[train]'"):
            __import__(package)
    from shira import PeftModel
    from shira.cli.train.trainer import fit, make_trainer, training_arguments, writing

    quieten(warnings_too=False)
    config = models.adapter_config(options)
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
        model = models.adapt(base, config, options, data, tokenizer, arguments.device)
    else:
        model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)

    since = checkpoints.started(checkpoint)
    made = [folder for folder in (output / checkpoints.CHECKPOINTS, output) if not folder.exists()]
    trainer = make_trainer(
        model,
        options,
        data,
        tokenizer,
        arguments,
        after_saving=lambda folder: checkpoints.write_record(folder, record, since),
    )
    try:
        result = fit(trainer, total=total, checkpoint=checkpoint)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # with a checkpoint in it, it stays
                folder.rmdir()
        raise
    if not trainer.is_world_process_zero():
        return
    with writing("the adapter", output):
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(output)
    write_outputs(output, options, data, result, model.peft_config["default"])
    _say_result(output, result)


def _say_result(output: Path, result: Result) -> None:
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
