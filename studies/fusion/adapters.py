# SPDX-License-Identifier: Apache-2.0
"""Adapters of several tasks in one model: each trained with its head, and how they overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from studies.accuracy.methods import low_rank_config, shira_config
from studies.accuracy.model import Classifier
from studies.fusion.protocol import Run

MASK_SEEDS_APART = 1000


def configs(
    run: Run, base: Classifier, heads: Mapping[str, nn.Module], batches: Callable[[str], Any]
) -> dict[str, Any]:
    """The adapter's configuration for each task.

    Args:
        run: family, size and seed.
        base: the model without adapters.
        heads: each task's, as they are before training.
        batches: gives a task's batches from which ``grad`` chooses.
    """
    found: dict[str, Any] = {}
    for number, (task, head) in enumerate(heads.items()):
        training = run.training(task)
        if run.family == "lora":
            found[task] = low_rank_config(training)
            continue
        base.classifier = head
        config = shira_config(base, training, lambda task=task: batches(task))
        if run.family == "independent":
            config = replace(config, random_seed=run.seed + MASK_SEEDS_APART * (number + 1))
        elif run.family == "slots":
            config = replace(config, mask_slot=number)
        found[task] = config
    return found


def overlaps(model: Any, tasks: Sequence[str]) -> dict[str, float]:
    """How the tasks' adapters overlap, the mean over their pairs.

    ``shared`` is the share of an adapter's positions that the other has too, ``cosine`` that of the
    angle between the two as vectors of the weights' size; for SHiRA also ``sign_conflicts``, the
    share of shared positions with values of opposite sign, and ``awor``, the share of zeros in the
    product of the two (paper, section 3.3).
    """
    from peft import LoraConfig

    if isinstance(model.peft_config[tasks[0]], LoraConfig):
        deltas = [_low_rank_deltas(model, task) for task in tasks]
        cosines = [float(nn.functional.cosine_similarity(a, b, dim=0)) for a, b in _pairs(deltas)]
        return {"shared": 1.0, "cosine": round(mean(cosines), 6)}
    from shira import Adapter, overlap

    found = [overlap(a, b) for a, b in _pairs([Adapter.from_model(model, task) for task in tasks])]
    figures = {
        "shared": [pair.shared / sum(p.nnz_a for p in pair.parameters) for pair in found],
        "cosine": [pair.cosine for pair in found],
        "sign_conflicts": [pair.conflict_share for pair in found],
        "awor": [pair.awor.value for pair in found if pair.awor is not None],
    }
    return {name: round(mean(values), 6) for name, values in figures.items()}


def _pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(combinations(values, 2))


@torch.no_grad()
def _low_rank_deltas(model: nn.Module, adapter: str) -> Tensor:
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return torch.cat([layer.get_delta_weight(adapter).flatten() for layer in layers])
