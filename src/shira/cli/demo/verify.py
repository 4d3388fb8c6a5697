# SPDX-License-Identifier: Apache-2.0
"""The demo's proofs, run in a process of their own: ``python -m shira.cli.demo.verify FOLDER``.

It knows nothing but the files the training wrote. It loads the base once and both adapters from
disk, predicts, switches between the adapters, takes them out, and compares every base weight with
a base that was loaded afresh. The findings go to standard output as one JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shira.cli.demo.task import PREDICTIONS, RESULTS, Task, head_labels
from shira.cli.output import no_accelerator_note, offline, quieten
from shira.cli.progress import track
from shira.cli.train.model import load_base, load_tokenizer


@dataclass(frozen=True)
class Proof:
    """A statement, and whether it was found to hold."""

    holds: bool
    statement: str


def verify(root: Path) -> dict[str, Any]:
    """Return what is found of everything that the demo wrote to `root`; `proofs` puts it in words.

    For each task: how many predictions were compared and differ, the largest difference of a logit,
    also between merged and unmerged, and the base weights that differ while the adapter is in. Of
    the base: how much was compared at the end, and what differs. The seconds of each switch.
    """
    from shira import PeftModel

    written = json.loads((root / RESULTS).read_text(encoding="utf-8"))
    module = importlib.import_module(f"shira.cli.demo.{written['task']}")
    task: Task = module.Demo(**written["settings"])
    names: list[str] = written["tasks"]
    options = task.options(written["model"])
    tokenizer = load_tokenizer(options)
    base, other = (
        load_base(options, head_labels(written), tokenizer.pad_token_id) for _ in range(2)
    )
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
    found["switch_seconds"] = _switch(model, names, task.switches)
    restored = model.unload()
    answers["base restored"] = task.answers(restored, tokenizer)
    found["answers"] = answers if answers["base"] else {}
    now = dict(base_weights(restored))
    found["base_tensors"] = len(fresh)
    found["base_weights"] = sum(tensor.numel() for tensor in fresh.values())
    found["base_missing"] = sorted(fresh.keys() ^ now.keys())
    found["base_changed"] = [
        name for name in fresh.keys() & now.keys() if not torch.equal(fresh[name], now[name])
    ]
    return found


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


def _switch(model: Any, tasks: Sequence[str], times: int) -> list[float]:
    seconds = []
    model.set_adapter(tasks[-1])
    model.merge_adapter()
    for turn in track(range(times), "switching adapters"):
        started = time.perf_counter()
        switch(model, tasks[turn % len(tasks)])
        seconds.append(time.perf_counter() - started)
    model.unmerge_adapter()
    return seconds


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
    offline()
    no_accelerator_note()
    quieten(warnings_too=True)
    print(json.dumps(verify(Path(sys.argv[1]))))
