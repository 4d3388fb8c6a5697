# SPDX-License-Identifier: Apache-2.0
"""The demo from beginning to end: text, tasks, training, proofs in a new process, tables."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shira.cli import libraries
from shira.cli._demo.settings import MODEL_NAME, Files, Settings, model_path
from shira.cli._demo.tasks import Task, build_tasks, collect
from shira.cli.output import console
from shira.cli.progress import say, track
from shira.errors import ConfigError, MissingDependencyError, ShiraError


def run_demo(root: Path, settings: Settings) -> bool:
    """Run the demo, writing into `root` alone.

    Returns:
        Whether every proof holds.

    Raises:
        MissingDependencyError: If a package is missing that ``shira[demo]`` brings.
        ConfigError: If ``root`` is a file, or a folder of something else.
    """
    started = time.perf_counter()
    libraries.offline()
    libraries.share_cores()
    libraries.no_accelerator_note()
    files = Files(root)
    _check_root(files)
    say(
        f"{MODEL_NAME}, density {settings.density:.1%}, {settings.steps} steps of "
        f"{settings.batch_size} texts, seed {settings.seed}"
    )
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs {error.name}: pip install 'shira[demo]'"
        ) from error
    libraries.quieten(warnings_too=True)
    root.mkdir(parents=True, exist_ok=True)
    _write_json(files.results, {"settings": asdict(settings)})
    out = console()

    tasks = make_tasks(settings)
    for task in tasks:
        _write_examples(task, files)
    runs = _train(tasks, settings, files)
    from shira.cli._demo.report import proofs, switch_line, task_table

    for task in tasks:
        out.print(task_table(task, *runs[task.name]))
        out.print()

    say("reloading both adapters in a new process")
    found = _verify(files)
    out.print("Proofs, in a new process that knows the saved files alone:")
    results = proofs(found)
    for proof in results:
        out.print(f"  {'holds ' if proof.holds else 'FAILS '} {proof.statement}", soft_wrap=True)
    out.print(f"  {switch_line(found)}", soft_wrap=True)
    say("drawing the report")
    _write_report(files, [task.name for task in tasks])
    seconds = time.perf_counter() - started
    _add_to_results(
        files,
        runs={
            name: {"frozen": asdict(frozen), "shira": asdict(shira)}
            for name, (frozen, shira) in runs.items()
        },
        verified=found,
        proofs=[asdict(proof) for proof in results],
        seconds=seconds,
    )
    out.print(f"Files in {root}, {seconds:.0f} seconds in all.", soft_wrap=True)
    out.print(f"Everything about both adapters, on one page: {files.report}", soft_wrap=True)
    return all(proof.holds for proof in results)


def _check_root(files: Files) -> None:
    """Refuse a folder in which the demo would overwrite what is not its own."""
    from shira.store.atomic import check_kind
    from shira.store.outputs import check_outputs

    root, model = files.root, model_path()  # the package is the first thing to be missing
    check_outputs({"--output": root}, checkpoints=[model])
    check_kind(root, folder=True)
    if root.exists() and any(root.iterdir()) and not files.results.exists():
        raise ConfigError(
            f"--output {root} is a folder of something else (it holds no {files.results.name}); "
            "name another"
        )


def make_tasks(settings: Settings) -> list[Task]:
    """The demo's two tasks, with progress shown."""
    docstrings = collect(
        seed=settings.seed,
        files_per_library=settings.files_per_library,
        track=lambda todo: track(todo, "reading docstrings"),
    )
    return build_tasks(
        docstrings,
        seed=settings.seed,
        train_per_label=settings.train_per_label,
        test_per_label=settings.test_per_label,
    )


def _train(tasks: Sequence[Task], settings: Settings, files: Files) -> dict[str, Any]:
    from safetensors.torch import save as to_bytes
    from transformers import AutoTokenizer

    from shira.cli._demo.training import train_frozen, train_shira
    from shira.store.atomic import write_atomically

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    outputs = max(len(task.labels) for task in tasks)  # two heads of one width fit one base
    runs = {}
    logits = {}
    for slot, task in enumerate(tasks):
        frozen = train_frozen(task, tokenizer, settings, outputs=outputs)
        adapted, logits[task.name] = train_shira(
            task, tokenizer, settings, outputs=outputs, slot=slot, files=files
        )
        runs[task.name] = (frozen, adapted)
    write_atomically(files.predictions, to_bytes(logits))
    _write_json(
        files.results,
        {
            "settings": asdict(settings),
            "tasks": [task.name for task in tasks],
            "labels": {task.name: task.labels for task in tasks},
            "outputs": outputs,
            "versions": _versions(),
        },
    )
    return runs


def _verify(files: Files) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "shira.cli._demo.verify", str(files.root)],
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


def _write_report(files: Files, tasks: Sequence[str]) -> None:
    from shira.checkpoints import open_checkpoint
    from shira.cli._report.writing import write_report

    adapters = [files.adapter(task) for task in tasks]
    write_report(adapters, files.report, open_checkpoint(model_path()))


def _write_examples(task: Task, files: Files) -> None:
    lines = [
        json.dumps(
            {
                "text": example.text,
                "label": task.labels[example.label],
                "split": split,
                "source": example.source,
            }
        )
        for split, examples in (("train", task.train), ("test", task.test))
        for example in examples
    ]
    _write(files.examples(task.name), "\n".join(lines) + "\n")


def _add_to_results(files: Files, **found: Any) -> None:
    _write_json(files.results, {**json.loads(files.results.read_text(encoding="utf-8")), **found})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    from shira.store.atomic import write_atomically

    write_atomically(path, text.encode())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from shira._version import __version__

    packages = ("torch", "transformers", "peft", "safetensors")
    return {
        "shira": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
