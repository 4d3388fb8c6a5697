# SPDX-License-Identifier: Apache-2.0
"""The demo from beginning to end: text, tasks, training, proofs in a new process, tables."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft  # noqa: F401  if it is missing, that is said first
from safetensors.torch import save as to_bytes

from shira.checkpoints import open_checkpoint
from shira.cli.demo.settings import (
    EXAMPLES,
    MODEL_NAME,
    PREDICTIONS,
    REPORT,
    RESULTS,
    Settings,
    model_path,
)
from shira.cli.demo.tasks import Task, build_tasks, collect
from shira.cli.demo.training import Run, train_task
from shira.cli.demo.verify import proofs
from shira.cli.output import console, megabytes, print_table, quieten
from shira.cli.progress import say
from shira.cli.report import write_report
from shira.cli.train.model import load_tokenizer
from shira.cli.train.outputs import versions
from shira.errors import ConfigError, ShiraError
from shira.store.atomic import check_kind, check_outputs, write_atomically


def run_demo(root: Path, settings: Settings) -> bool:
    """Run the demo, writing into `root` alone; return whether every proof holds."""
    started = time.perf_counter()
    _check_root(root)
    say(
        f"{MODEL_NAME}, density {settings.density:.1%}, {settings.steps} steps of "
        f"{settings.batch_size} texts, seed {settings.seed}"
    )
    quieten(warnings_too=True)
    root.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"settings": asdict(settings)}
    _write_json(root / RESULTS, results)  # from here on the folder is the demo's
    out = console()

    docstrings = collect(seed=settings.seed, files_per_library=settings.files_per_library)
    tasks = build_tasks(
        docstrings,
        seed=settings.seed,
        train_per_label=settings.train_per_label,
        test_per_label=settings.test_per_label,
    )
    for task in tasks:
        _write_examples(root, task)
    outputs = max(len(task.labels) for task in tasks)  # two heads of one width fit one base
    tokenizer = load_tokenizer(settings.options())
    runs, logits = {}, {}
    for slot, task in enumerate(tasks):
        runs[task.name], logits[task.name] = train_task(
            task, tokenizer, settings, outputs=outputs, slot=slot, root=root
        )
    write_atomically(root / PREDICTIONS, to_bytes(logits))
    results |= {
        "tasks": [task.name for task in tasks],
        "labels": {task.name: task.labels for task in tasks},
        "outputs": outputs,
        "versions": versions(),
    }
    _write_json(root / RESULTS, results)
    for task in tasks:
        _print_task(task, runs[task.name])
        out.print()

    say("reloading both adapters in a new process")
    found = _verify(root)
    out.print("Proofs, in a new process that knows the saved files alone:")
    proven = list(proofs(found))
    for proof in proven:
        out.print(f"  {'holds ' if proof.holds else 'FAILS '} {proof.statement}", soft_wrap=True)
    seconds = found["switch_seconds"]
    out.print(
        "  a switch (unmerge, set_adapter, merge) takes "
        f"{1000 * statistics.median(seconds):.2f} ms in the median of {len(seconds)}",
        soft_wrap=True,
    )
    say("drawing the report")
    adapters = [root / task.name for task in tasks]
    write_report(adapters, root / REPORT, open_checkpoint(model_path()))
    took = time.perf_counter() - started
    results |= {
        "runs": {n: {how: asdict(run) for how, run in both.items()} for n, both in runs.items()},
        "verified": found,
        "proofs": [asdict(proof) for proof in proven],
        "seconds": took,
    }
    _write_json(root / RESULTS, results)
    out.print(f"Files in {root}, {took:.0f} seconds in all.", soft_wrap=True)
    out.print(f"Everything about both adapters, on one page: {root / REPORT}", soft_wrap=True)
    return all(proof.holds for proof in proven)


def _check_root(root: Path) -> None:
    """Refuse a folder in which the demo would overwrite what is not its own."""
    model = model_path()  # the package is the first thing to be missing
    check_outputs({"--output": root}, checkpoints=[model])
    check_kind(root, folder=True)
    if root.exists() and any(root.iterdir()) and not (root / RESULTS).exists():
        raise ConfigError(
            f"--output {root} is a folder of something else (it holds no {RESULTS}); name another"
        )


def _verify(root: Path) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "shira.cli.demo.verify", str(root)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        raise ShiraError(
            f"the second process ended with status {process.returncode}; what it said is above"
        )
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def _print_task(task: Task, runs: Mapping[str, Run]) -> None:
    columns = ("accuracy", "trained parameters", "share of model", "file", "seconds")
    note = (
        f"{len(task.labels)} labels, chance {1 / len(task.labels):.1%}, "
        f"{len(task.train):,} training and {len(task.test):,} test docstrings"
    )
    names = {"frozen": "before: frozen encoder, trained head", "shira": "after: SHiRA"}
    rows = []
    for how, run in runs.items():
        share = run.accuracy
        error = math.sqrt(share * (1 - share) / max(len(task.test), 1))  # one standard error
        row = (
            names[how],
            f"{share:.1%} (+- {error:.1%})",
            f"{run.trained:,}",
            f"{run.trained / run.total:.2%}",
            "-" if run.file_bytes is None else megabytes(run.file_bytes),
            f"{run.seconds:.0f}",
        )
        rows.append(row)
    print_table(f"{task.name}: {task.question}", ("", *columns), rows, columns, note)


def _write_examples(root: Path, task: Task) -> None:
    rows = [
        {"text": doc.text, "label": getattr(doc, task.name), "split": split, "source": doc.source}
        for split, docs in (("train", task.train), ("test", task.test))
        for doc in docs
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    write_atomically(root / EXAMPLES.format(task=task.name), text.encode())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
