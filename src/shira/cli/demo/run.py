# SPDX-License-Identifier: Apache-2.0
"""The demo from beginning to end: texts, training, proofs in a new process, tables.

The proofs are ``python -m shira.cli.demo.run FOLDER``, which knows the files of the training alone.
It loads both adapters from disk, predicts, switches between them, takes them out, and compares
every base weight with a fresh load. The findings are the last line of its output, as JSON.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import TrainingArguments

from shira.checkpoints import open_checkpoint
from shira.cli.demo.task import PREDICTIONS, REPORT, RESULTS, Task, head_labels
from shira.cli.output import console, megabytes, print_table, quieten
from shira.cli.progress import say, track
from shira.cli.report import write_report
from shira.cli.train.data import Data
from shira.cli.train.model import adapt, load_base, load_tokenizer
from shira.cli.train.options import TrainOptions
from shira.cli.train.outputs import versions, write_json
from shira.cli.train.trainer import fit, make_trainer, training_arguments
from shira.errors import ConfigError, ShiraError
from shira.store.atomic import check_kind, check_outputs, write_atomically
from shira.store.names import WEIGHTS_NAME


def run_demo(root: Path, name: str, task: Task) -> bool:
    """Run the demo of this name, with `root` for its files; return whether every proof holds."""
    started = time.perf_counter()
    quieten(warnings_too=True)
    _check_root(root)
    model: Path = importlib.import_module(f"shira.cli.demo.{name}").model_path()
    check_outputs({"--output": root}, checkpoints=[model])
    say(
        f"{task.MODEL}, density {task.density:.1%}, {task.steps} steps of "
        f"{task.batch_size} texts, seed {task.seed}"
    )
    root.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"task": name, "model": str(model), "settings": asdict(task)}
    write_json(root / RESULTS, results)  # from here on the folder is the demo's
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
    write_json(root / RESULTS, results)

    say("reloading both adapters in a new process")
    command = [sys.executable, "-m", "shira.cli.demo.run", str(root)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
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
    told = [asdict(proof) for proof in proven]
    results |= {"runs": runs, "verified": found, "proofs": told, "seconds": took}
    write_json(root / RESULTS, results)
    out.print(f"Files in {root}, {took:.0f} seconds in all.", soft_wrap=True)
    out.print(f"Everything about both adapters, on one page: {root / REPORT}", soft_wrap=True)
    return all(proof.holds for proof in proven)


def _check_root(root: Path) -> None:
    """Refuse a folder in which the demo would overwrite what is not its own."""
    check_kind(root, folder=True)
    if root.exists() and any(root.iterdir()) and not (root / RESULTS).exists():
        raise ConfigError(
            f"--output {root} is a folder of something else (it holds no {RESULTS}); name another"
        )


def _train(
    task: Task, name: str, options: TrainOptions, data: Data, tokenizer: Any, root: Path
) -> tuple[dict[str, Any], Any]:
    """Train and save an adapter, and before that the same head alone; return figures and model."""
    folder, runs = root / name, {}
    before, after = task.RUNS
    for how in (before, after) if task.head_learning_rate else (after,):
        model = load_base(options, data.labels, tokenizer.pad_token_id)
        total = sum(parameter.numel() for parameter in model.parameters())
        if how == after:
            model = adapt(model, options, data, tokenizer, torch.device("cpu"))
        else:
            for parameter, tensor in model.named_parameters():
                tensor.requires_grad_(_in_head(parameter))
        named = [(n, tensor) for n, tensor in model.named_parameters() if tensor.requires_grad]
        more: dict[str, Any] = {}
        if task.head_learning_rate:
            groups = [
                {"params": [tensor for n, tensor in named if _in_head(n) == head], "lr": rate}
                for head, rate in ((True, task.head_learning_rate), (False, task.learning_rate))
            ]
            optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
            more["optimizers"] = (optimizer, None)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = training_arguments(
                options, Path(scratch), save_strategy="no", **_grouped_by_length()
            )
            given = (model, options, data, tokenizer, arguments)
            trainer = make_trainer(*given, what=f"{name}: {how}", **more)
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
            "trained_in_encoder": sum(tensor.numel() for n, tensor in named if not _in_head(n)),
            "total": total,
            "seconds": result.seconds,
            "file_bytes": (folder / WEIGHTS_NAME).stat().st_size if how == after else None,
        }
    return runs, model


def _in_head(name: str) -> bool:
    return "classifier." in name


def _grouped_by_length() -> dict[str, Any]:
    """Return the argument for batches of similar length, which transformers has renamed."""
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
        share, file = f"{trained / run['total']:.2%}", "-" if size is None else megabytes(size)
        figure, seconds = task.shown(run[task.FIGURE], tested), f"{run.get('seconds', 0):.0f}"
        rows.append((task.RUNS[how], figure, f"{trained:,}", share, file, seconds))
    count = f"{len(data.train):,} training and {tested:,} test {task.TEXTS}"
    note = f"{task.note(name, facts)}, {count}"
    print_table(f"{name}: {task.ABOUT[name]}", ("", *columns), rows, columns, note)


# ------------------------------------------------------------------------------------ the proofs


@dataclass(frozen=True)
class Proof:
    """A statement, and whether it was found to hold."""

    holds: bool
    statement: str


def verify(root: Path) -> dict[str, Any]:
    """Return what is found of all that the demo wrote to `root`; `proofs` puts it in words."""
    from shira import PeftModel

    written = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    module = importlib.import_module(f"shira.cli.demo.{written['task']}")
    task: Task = module.Demo(**written["settings"])
    names: list[str] = written["tasks"]
    options = task.options(written["model"])
    tokenizer = load_tokenizer(options)
    labels = head_labels(written)
    base, other = (load_base(options, labels, tokenizer.pad_token_id) for _ in range(2))
    fresh = dict(base_weights(other))
    answers = {"base": task.answers(base, tokenizer)}
    model: Any = PeftModel.from_pretrained(base, root / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(root / name, adapter_name=name)

    predictions = load_file(root / PREDICTIONS)
    found: dict[str, Any] = {"tasks": {}}
    for name in names:
        saved = predictions[name]
        model.set_adapter(name)
        logits = task.predict(model, tokenizer, root, name, "again")
        model.merge_adapter()
        merged = task.predict(model, tokenizer, root, name, "with it merged")
        answers[name] = task.answers(model, tokenizer)
        found["tasks"][name] = {
            "predictions": len(saved),
            "predictions_changed": int((logits.argmax(1) != saved.argmax(1)).sum()),
            "largest_logit_difference": float((logits - saved).abs().max()),
            "merged_difference": float((merged - logits).abs().max()),
            "weights_changed_while_in": sum(
                int((tensor != fresh[name]).sum())
                for name, tensor in base_weights(model)
                if name in fresh
            ),
        }
        model.unmerge_adapter()
    seconds = []
    model.set_adapter(names[-1])
    model.merge_adapter()
    for turn in track(range(task.switches), "switching adapters"):
        started = time.perf_counter()
        switch(model, names[turn % len(names)])
        seconds.append(time.perf_counter() - started)
    model.unmerge_adapter()
    restored = model.unload()
    answers["base restored"] = task.answers(restored, tokenizer)
    now = dict(base_weights(restored))
    both = fresh.keys() & now.keys()
    return found | {
        "switch_seconds": seconds,
        "answers": answers if answers["base"] else {},
        "base_tensors": len(fresh),
        "base_weights": sum(tensor.numel() for tensor in fresh.values()),
        "base_missing": sorted(fresh.keys() ^ now.keys()),
        "base_changed": [name for name in both if not torch.equal(fresh[name], now[name])],
    }


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the base's own weights under its own names, without the head and without adapters."""
    for name, tensor in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "shira_" not in plain and not plain.startswith("classifier."):
            yield plain, tensor


def switch(model: Any, task: str) -> None:
    """Take out the merged adapter and put in that of `task`: PEFT's calls alone."""
    model.unmerge_adapter()
    model.set_adapter(task)
    model.merge_adapter()


def proofs(found: Mapping[str, Any]) -> Iterator[Proof]:
    """Return the findings of `verify` as statements that hold or do not."""
    for task, seen in found["tasks"].items():
        yield Proof(
            seen["predictions_changed"] == 0 and seen["largest_logit_difference"] < 1e-4,
            f"{task}: {seen['predictions'] - seen['predictions_changed']} of "
            f"{seen['predictions']} predictions equal those of the training process "
            f"(largest difference of a logit: {seen['largest_logit_difference']:.1e})",
        )
        yield Proof(
            seen["weights_changed_while_in"] > 0 and seen["merged_difference"] < 1e-4,
            f"{task}: merged, {seen['weights_changed_while_in']:,} base weights are "
            "overwritten and the logits are those of the unmerged model "
            f"(largest difference: {seen['merged_difference']:.1e})",
        )
    if said := found["answers"]:
        same = sum(said["base"][prompt] == text for prompt, text in said["base restored"].items())
        yield Proof(
            same == len(said["base"]),
            f"{same} of {len(said['base'])} answers of the restored base are word for word those "
            "of before",
        )
    changed = len(found["base_changed"]) + len(found["base_missing"])
    yield Proof(
        changed == 0,
        f"after {len(found['switch_seconds'])} switches, "
        f"{found['base_tensors'] - changed} of {found['base_tensors']} base tensors "
        f"({found['base_weights']:,} weights) are bit for bit those of a fresh load",
    )


if __name__ == "__main__":
    quieten(warnings_too=True)
    print(json.dumps(verify(Path(sys.argv[1]))))
