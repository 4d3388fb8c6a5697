# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained adapter, as the Hugging Face hub reads them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shira.cli._train.options import TrainOptions
from shira.errors import shown

if TYPE_CHECKING:
    from shira.cli._train.data import Data
    from shira.cli._train.run import Result

AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
PIPELINES = {"text-classification": "text-classification", "causal-lm": "text-generation"}


_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")  # no name of Markdown


def model_card(
    options: TrainOptions,
    data: Data,
    result: Result,
    config: Any,
    *,
    versions: Mapping[str, str],
    plot: bool,
) -> str:
    """The text of ``README.md``: what was trained, on what, the result, and how to use it."""
    import yaml

    task = options.task or ""
    head = {
        "base_model": options.model,
        "library_name": "peft",
        "pipeline_tag": PIPELINES[task],
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
        ", ".join(f"{package} {number}" for package, number in versions.items()),
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
    """The command of this process, as a user would type it again."""
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
    kind = AUTO_CLASSES[options.task or ""]
    labels = "" if data.labels is None else f", num_labels={len(data.labels)}"
    return (
        "```python\n"
        f"from transformers import {kind}\n"
        "from shira import PeftModel  # stock PEFT reads it as well\n\n"
        f"base = {kind}.from_pretrained({options.model!r}{labels})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n'
        "```"
    )
