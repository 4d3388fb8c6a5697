# SPDX-License-Identifier: Apache-2.0
"""The demo from beginning to end: texts, training, proofs in a new process, tables."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from transformers import TrainingArguments

from shira.checkpoints import open_checkpoint
from shira.cli.demo.task import PREDICTIONS, REPORT, RESULTS, Task
from shira.cli.demo.verify import proofs
from shira.cli.output import console, megabytes, print_table, quieten
from shira.cli.progress import say
from shira.cli.report import write_report
from shira.cli.train.data import Data
from shira.cli.train.model import adapt, adapter_config, load_base, load_tokenizer
from shira.cli.train.options import TrainOptions
from shira.cli.train.outputs import versions
from shira.cli.train.trainer import fit, make_trainer, training_arguments
from shira.errors import ConfigError, ShiraError
from shira.store.atomic import check_kind, check_outputs, write_atomically
from shira.store.names import WEIGHTS_NAME


def run_demo(root: Path, name: str, task: Task) -> bool:
    """Run the demo of this name, writing into `root` alone; return whether every proof holds."""
    started = time.perf_counter()
    quieten(warnings_too=True)
    model: Path = importlib.import_module(f"shira.cli.demo.{name}").model_path()
    _check_root(root, model)
    say(
        f"{task.MODEL}, density {task.density:.1%}, {task.steps} steps of "
        f"{task.batch_size} texts, seed {task.seed}"
    )
    root.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"task": name, "model": str(model), "settings": asdict(task)}
    _write_json(root / RESULTS, results)  # from here on the folder is the demo's
    out = console()

    facts = task.write_texts(root)
    results |= {**facts, "versions": versions()}
    runs: dict[str, dict[str, Any]] = {}
    logits = {}
    for slot, adapter in enumerate(facts["tasks"]):
        options = task.options(model, slot)
        tokenizer = load_tokenizer(options)
        data = task.data(root, adapter, tokenizer, facts)
        runs[adapter], trained = _train(task, adapter, options, data, tokenizer, root)
        logits[adapter] = task.predict(trained, tokenizer, root, adapter, "with it trained")
        _print_figures(task, adapter, facts, data, runs[adapter])
        out.print()
    write_atomically(root / PREDICTIONS, to_bytes(logits))
    _write_json(root / RESULTS, results)

    say("reloading both adapters in a new process")
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
    for prompt in found["answers"].get("base", ()):
        rows = [(w, " ".join(said[prompt].split())) for w, said in found["answers"].items()]
        print_table(" ".join(prompt.split()), ("model", "answer"), rows)
        out.print()
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
    adapters = [root / adapter for adapter in facts["tasks"]]
    write_report(adapters, root / REPORT, open_checkpoint(model), fast=task.FAST_REPORT)
    took = time.perf_counter() - started
    results |= {
        "runs": runs,
        "verified": found,
        "proofs": [asdict(proof) for proof in proven],
        "seconds": took,
    }
    _write_json(root / RESULTS, results)
    out.print(f"Files in {root}, {took:.0f} seconds in all.", soft_wrap=True)
    out.print(f"Everything about both adapters, on one page: {root / REPORT}", soft_wrap=True)
    return all(proof.holds for proof in proven)


def _check_root(root: Path, model: Path) -> None:
    """Refuse a folder in which the demo would overwrite what is not its own."""
    check_outputs({"--output": root}, checkpoints=[model])
    check_kind(root, folder=True)
    if root.exists() and any(root.iterdir()) and not (root / RESULTS).exists():
        raise ConfigError(
            f"--output {root} is a folder of something else (it holds no {RESULTS}); name another"
        )


def _train(
    task: Task, name: str, options: TrainOptions, data: Data, tokenizer: Any, root: Path
) -> tuple[dict[str, Any], Any]:
    """Train an adapter, and before that a new head without one; return figures and the model.

    Both start from the same head and see the same batches. Adapter and head are written into the
    folder of `root` that is named as the adapter.
    """
    folder, runs = root / name, {}
    before, after = task.RUNS
    for how in (before, after) if task.head_learning_rate else (after,):
        model = load_base(options, data.labels, tokenizer.pad_token_id)
        total = sum(parameter.numel() for parameter in model.parameters())
        if how == after:
            config, device = adapter_config(options), torch.device("cpu")
            model = adapt(model, config, options, data, tokenizer, device)
        else:
            for parameter, tensor in model.named_parameters():
                tensor.requires_grad_(_in_head(parameter))
        named = [(n, tensor) for n, tensor in model.named_parameters() if tensor.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [tensor for n, tensor in named if _in_head(n) == head], "lr": rate}
            for head, rate in ((True, task.head_learning_rate), (False, task.learning_rate))
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(
                options, Path(scratch), save_strategy="no", **_grouped_by_length()
            )
            what = f"{name}: {how}"
            more: dict[str, Any] = {"what": what, "optimizers": (optimizer, None)}
            trainer = make_trainer(model, options, data, tokenizer, arguments, **more)
            result = fit(trainer, total=total)
        if how == after:
            model.save_pretrained(folder)
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, an empty form
        if result.before:
            runs[before] = {task.FIGURE: result.before[task.FIGURE], "total": total}
        runs[how] = {
            task.FIGURE: result.after[task.FIGURE],
            "trained": result.trained,
            "trained_in_encoder": sum(tensor.numel() for tensor in groups[1]["params"]),
            "total": total,
            "seconds": result.seconds,
            "file_bytes": (folder / WEIGHTS_NAME).stat().st_size if how == after else None,
        }
    return runs, model


def _in_head(name: str) -> bool:
    return "classifier." in name


def _grouped_by_length() -> dict[str, Any]:
    """Return the argument for batches of similar length, a fifth less to compute, as it is named.

    Transformers has changed it.
    """
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def _print_figures(
    task: Task, name: str, facts: Mapping[str, Any], data: Data, runs: Mapping[str, Any]
) -> None:
    columns = (task.FIGURE, "trained parameters", "share of model", "file", "seconds")
    tested = len(data.evaluation or ())
    rows = []
    for how, run in runs.items():
        trained, size = run.get("trained", 0), run.get("file_bytes")
        cells = (
            task.RUNS[how],
            task.shown(run[task.FIGURE], tested),
            f"{trained:,}",
            f"{trained / run['total']:.2%}",
            "-" if size is None else megabytes(size),
            f"{run.get('seconds', 0):.0f}",
        )
        rows.append(cells)
    note = (
        f"{task.note(name, facts)}, {len(data.train):,} training and {tested:,} test {task.TEXTS}"
    )
    print_table(f"{name}: {task.ABOUT[name]}", ("", *columns), rows, columns, note)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
