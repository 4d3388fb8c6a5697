# SPDX-License-Identifier: Apache-2.0
"""The demo's proofs, run in a process of their own: ``python -m shira.cli._demo.verify FOLDER``.

It knows nothing but the files the training wrote. It loads the base once and both adapters from
disk, predicts, switches between the adapters, takes them out, and compares every base weight with
a base that was loaded afresh. The findings go to standard output as one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shira.cli import libraries
from shira.cli._demo.predict import encode, predict_logits
from shira.cli._demo.settings import Files, Settings, model_path
from shira.cli.progress import Steps


def verify(root: Path) -> dict[str, Any]:
    """Run every proof on what the demo wrote to `root`.

    Returns:
        For each task: how many predictions were compared, how many differ, the largest difference
        of a logit, the largest one between merged and unmerged answers, and the base weights that
        differ while the adapter is in. For the base: how much was compared at the end, and the
        names of what differs. The seconds of each switch.
    """
    files = Files(root)
    written = json.loads(files.results.read_text(encoding="utf-8"))
    settings = Settings(**written["settings"])
    tasks: list[str] = written["tasks"]
    model, tokenizer = _load(files, tasks, written["outputs"])
    fresh = dict(base_weights(_base(written["outputs"])))

    saved = load_file(files.predictions)
    found: dict[str, Any] = {"tasks": {}}
    for task in tasks:
        ids = encode(tokenizer, _test_texts(files, task), max_length=settings.max_length)
        found["tasks"][task] = _compare_predictions(
            model, task, ids, saved[task], tokenizer.pad_token_id, fresh
        )
    found["switch_seconds"] = _switch(model, tasks, settings.switches)
    now = dict(base_weights(model))
    found["base_tensors"] = len(fresh)
    found["base_weights"] = sum(tensor.numel() for tensor in fresh.values())
    found["base_missing"] = sorted(fresh.keys() ^ now.keys())
    found["base_changed"] = [
        name for name in fresh.keys() & now.keys() if not torch.equal(fresh[name], now[name])
    ]
    return found


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's own weights under its own names, without the head and without adapters."""
    for name, tensor in model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if "shira_" not in plain and not plain.startswith("classifier."):
            yield plain, tensor


def switch(model: Any, task: str) -> None:
    """Take out the merged adapter and put in that of `task`: PEFT's calls alone."""
    model.unmerge_adapter()
    model.set_adapter(task)
    model.merge_adapter()


def _base(outputs: int) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        model_path(), num_labels=outputs
    )
    return model.eval()


def _load(files: Files, tasks: Sequence[str], outputs: int) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from shira import PeftModel

    first, *others = tasks
    model = PeftModel.from_pretrained(_base(outputs), files.adapter(first), adapter_name=first)
    for task in others:
        model.load_adapter(files.adapter(task), adapter_name=task)
    return model.eval(), AutoTokenizer.from_pretrained(model_path())


def _test_texts(files: Files, task: str) -> list[str]:
    rows = map(json.loads, files.examples(task).read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["split"] == "test"]


def _compare_predictions(
    model: Any,
    task: str,
    ids: Sequence[Sequence[int]],
    saved: Tensor,
    pad_token_id: int,
    fresh: dict[str, Tensor],
) -> dict[str, Any]:
    model.set_adapter(task)
    logits = predict_logits(model, ids, pad_token_id=pad_token_id, what=f"{task}: predicting again")
    model.merge_adapter()
    merged = predict_logits(
        model, ids, pad_token_id=pad_token_id, what=f"{task}: predicting with it merged"
    )
    inside = sum(
        int((tensor != fresh[name]).sum()) for name, tensor in base_weights(model) if name in fresh
    )
    model.unmerge_adapter()
    return {
        "predictions": len(saved),
        "predictions_changed": int((logits.argmax(1) != saved.argmax(1)).sum()),
        "largest_logit_difference": float((logits - saved).abs().max()),
        "merged_difference": float((merged - logits).abs().max()),
        "weights_changed_while_in": inside,
    }


def _switch(model: Any, tasks: Sequence[str], times: int) -> list[float]:
    seconds = []
    model.set_adapter(tasks[-1])
    model.merge_adapter()
    with Steps("switching adapters", times) as steps:
        for turn in range(times):
            started = time.perf_counter()
            switch(model, tasks[turn % len(tasks)])
            seconds.append(time.perf_counter() - started)
            steps.update(turn + 1)
    model.unmerge_adapter()
    return seconds


def median_milliseconds(seconds: Sequence[float]) -> float:
    """The median of some durations, in milliseconds."""
    return 1000 * statistics.median(seconds)


if __name__ == "__main__":
    libraries.offline()
    libraries.no_accelerator_note()
    libraries.quieten(warnings_too=True)
    print(json.dumps(verify(Path(sys.argv[1]))))
