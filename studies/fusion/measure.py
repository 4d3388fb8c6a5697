# SPDX-License-Identifier: Apache-2.0
"""One run: three adapters trained, measured alone, fused in every way, and measured again."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from studies.accuracy import data as rows
from studies.accuracy.methods import trained
from studies.accuracy.model import Classifier
from studies.accuracy.train import batches, between, clocks, fit, measure
from studies.fusion.adapters import configs, overlaps
from studies.fusion.protocol import TASKS, Run


def execute(run: Run, data: Path, **settings: int) -> dict[str, Any]:
    """Train, fuse and measure, on the test rows of each task with its own head.

    Args:
        run: the configuration.
        data: the folder of the tasks.
        settings: overrides fields of the training, for tests.

    Returns:
        Accuracies of each task with the head that was trained beside its adapter: ``alone`` with
        that adapter, ``without`` any, ``others`` with one of another task (the mean of them),
        ``fused`` by each way. ``overlap``: see `overlaps`. ``trained``: parameters of one adapter.
    """
    from shira import get_peft_model

    started = clocks()
    trainings = {task: run.training(task, **settings) for task in TASKS}
    training_rows = {task: rows.splits_of(each, data)[0] for task, each in trainings.items()}
    any_training = trainings[TASKS[0]]
    base = Classifier(1, frozen_blocks=any_training.frozen_blocks, seed=run.seed)
    heads = {task: _head(base, len(rows.label_names(data, task)), run.seed) for task in TASKS}

    def calibration(task: str) -> list[Any]:
        training = trainings[task]
        return list(batches(training_rows[task], training, training.calibration_batches, "mask"))

    base.requires_grad_(False)
    chosen = configs(run, base, heads, calibration)
    model: Any = None
    encoder_parameters = 0
    for task, config in chosen.items():
        if model is None:
            model = get_peft_model(base, config, adapter_name=task)
        else:
            model.add_adapter(task, config)
        model.set_adapter(task)
        base.classifier = heads[task].requires_grad_(True)
        training = trainings[task]
        torch.manual_seed(run.seed)
        encoder_parameters = trained(model)["encoder"]
        fit(model, training, batches(training_rows[task], training, training.steps, "training"))
        heads[task].requires_grad_(False)

    def figures() -> dict[str, float]:
        found = {}
        for task in TASKS:
            base.classifier = heads[task]
            found[task] = measure(model, rows.test_split_of(trainings[task], data), task)
        return found

    with_each: dict[str, dict[str, float]] = {}
    for task in TASKS:
        model.set_adapter(task)
        with_each[task] = figures()
    with model.disable_adapter():
        without = figures()
    fused = {}
    for way, (weight, combination, options) in run.ways.items():
        torch.manual_seed(run.seed)  # PEFT's DARE draws from the global generator
        names = list(TASKS)
        model.add_weighted_adapter(
            names, [weight] * len(names), way, combination_type=combination, **options
        )
        model.set_adapter(way)
        fused[way] = figures()
        model.set_adapter(TASKS[0])
        model.delete_adapter(way)
    return {
        "without": without,
        "alone": {task: with_each[task][task] for task in TASKS},
        "others": {
            task: round(mean(with_each[other][task] for other in TASKS if other != task), 6)
            for task in TASKS
        },
        "fused": fused,
        "overlap": overlaps(model, TASKS),
        "trained": encoder_parameters,
        "seconds": between(started, clocks()),
    }


def _head(base: Classifier, labels: int, seed: int) -> nn.Module:
    """A head that the seed alone decides: the one that `Classifier` would make."""
    torch.manual_seed(seed)
    return nn.Linear(base.classifier.in_features, labels)
