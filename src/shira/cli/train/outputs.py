# SPDX-License-Identifier: Apache-2.0
"""The files of a run beside the adapter: figures, options, class names, plot, model card."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shira._version import __version__
from shira.cli.pictures import new_drawing, write_drawing
from shira.cli.train.data import Data
from shira.cli.train.options import TASKS, TrainOptions
from shira.errors import shown
from shira.store.atomic import write_atomically

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")  # no name of Markdown


@dataclass(frozen=True)
class Result:
    """Figures of a run, as ``metrics.json`` has them."""

    before: dict[str, float]  # of the evaluation before training, empty where they say nothing
    after: dict[str, float]
    history: list[dict[str, float]]  # what was logged, each with its step
    train_loss: float
    steps: int
    trained: int  # parameters
    total: int  # parameters of the base
    seconds: float  # without loading and evaluating
    processes: int
    device: str
    peak_bytes: int | None


def write_outputs(
    output: Path, options: TrainOptions, data: Data, result: Result, config: Any
) -> None:
    """Write ``metrics.json``, ``train.yaml``, ``labels.json``, ``loss.png`` and ``README.md``."""
    import yaml

    figures = {
        **asdict(result),
        "rows": {"train": len(data.train), "evaluation": len(data.evaluation or ())},
        "versions": versions(),
        "platform": platform.platform(),
    }
    write_json(output / "metrics.json", figures)
    job = {
        name: value
        for name, value in asdict(options.filled()).items()
        if value is not None and name not in ("resume", "overwrite")  # which are of this run
    }
    write_atomically(output / "train.yaml", yaml.safe_dump(job, sort_keys=False).encode())
    if data.labels is not None:
        write_json(output / "labels.json", data.labels)
    plotted = plot_losses(result.history, output / "loss.png")
    card = model_card(options, data, result, config, plot=plotted)
    write_atomically(output / "README.md", f"{card}\n".encode())


def versions() -> dict[str, str]:
    """Return the versions of everything that had a part in a run."""
    return {
        "shira": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON, in place of whatever file is there."""
    write_atomically(path, f"{json.dumps(content, indent=2)}\n".encode())


def plot_losses(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw the logged losses over the optimizer steps as a PNG; return False if there is none."""
    figure = new_drawing((6.4, 4.0), "--output", path)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    for key, label, marker in (("loss", "training", "."), ("eval_loss", "evaluation", "o")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    if not axes.lines:
        return False
    axes.legend()
    axes.grid(alpha=0.3)
    write_drawing(figure, path)
    return True


def model_card(
    options: TrainOptions, data: Data, result: Result, config: Any, *, plot: bool
) -> str:
    """Return the text of ``README.md``, as the Hugging Face hub reads it."""
    import yaml

    task = options.task or ""
    head = {
        "base_model": options.model,
        "library_name": "peft",
        "pipeline_tag": TASKS[task].pipeline,
        "tags": ["shira", "sparse-high-rank-adapter", "peft"],
    }
    name = Path(options.output or "").resolve().name
    budget = f"density {config.density:g}" if config.density else f"r = {config.r}"
    command = shown(command_line())
    fence = "`" * max(3, _longest_run(command) + 1)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name if _PLAIN.fullmatch(name) else _code(name)}",
        f"A SHiRA adapter (Sparse High Rank Adapter, arXiv 2406.13175) of "
        f"{_code(options.model)} for {task}.",
        "## Result",
        _figures(result),
        *(["![loss](loss.png)"] if plot else []),
        "## Data",
        _data(options, data),
        "## Adapter",
        f"Mask {_code(config.mask_type)}, seed {config.random_seed}, {budget}, targets "
        f"{_code(options.target_modules or 'all-linear')}: {result.trained:,} of {result.total:,} "
        f"parameters trained ({result.trained / result.total:.2%}).",
        "## Use",
        _usage(options, data),
        "## How it was made",
        f"{fence}bash\n{command}\n{fence}",
        f"{result.steps} steps in {result.seconds:.0f} s on {result.processes} x {result.device}. "
        "All options are in `train.yaml`, all figures in `metrics.json`.",
        ", ".join(f"{package} {number}" for package, number in versions().items()),
    ]
    return "\n\n".join(parts)


def _code(text: object) -> str:
    """Return a text as a span of code, in which Markdown and HTML have no effect."""
    text = shown(text)
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text or text.startswith(" ") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _longest_run(text: str) -> int:
    """Return the length of the longest row of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def command_line() -> str:
    """Return the command of this process, as a user would type it again."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["shira"]
    if processes > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
        start = ["torchrun", "--nproc-per-node", local, "-m", "shira"]
        if int(local) < processes:
            start[1:1] = ["--nnodes", str(processes // int(local))]
    return shlex.join([*start, *sys.argv[1:]])


def _figures(result: Result) -> str:
    names = [name for name in result.after if name != "epoch"]
    if not names:
        return f"Training loss {result.train_loss:.4g}. It was not evaluated."
    rows = [f"| {' | '.join(('evaluation', *names))} |", f"|{'---|' * (len(names) + 1)}"]
    for when, figures in (("before", result.before), ("after", result.after)):
        if figures:
            rows.append(f"| {' | '.join((when, *(f'{figures[name]:.4g}' for name in names)))} |")
    return "\n".join(rows) + f"\n\nTraining loss {result.train_loss:.4g}."


def _data(options: TrainOptions, data: Data) -> str:
    lines = [f"- trained on {_code(Path(options.train_file or '').name)}: {len(data.train):,} rows"]
    if data.evaluation is not None:
        held_out = f"{options.eval_fraction:.0%} of it" if options.eval_fraction else ""
        source = held_out or _code(Path(options.eval_file or "").name)
        lines.append(f"- evaluated on {source}: {len(data.evaluation):,} rows")
    if data.labels is not None:
        some = ", ".join(map(_code, data.labels[:20])) + (", ..." if len(data.labels) > 20 else "")
        lines.append(f"- {len(data.labels)} labels: {some}")
    lines.append(f"- at most {options.max_length} tokens each")
    return "\n".join(lines)


def _usage(options: TrainOptions, data: Data) -> str:
    kind = TASKS[options.task or ""].auto_class
    labels = "" if data.labels is None else f", num_labels={len(data.labels)}"
    return (
        "```python\n"
        f"from transformers import {kind}\n"
        "from shira import PeftModel  # stock PEFT reads it as well\n\n"
        f"base = {kind}.from_pretrained({options.model!r}{labels})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        "```"
    )
