# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: one table a task, and the list of proofs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from shira.cli._demo.tasks import Task
from shira.cli._demo.training import Run
from shira.cli._demo.verify import median_milliseconds
from shira.cli.output import megabytes, table


@dataclass(frozen=True)
class Proof:
    """A statement, and whether it was found to hold."""

    holds: bool
    statement: str


def task_table(task: Task, frozen: Run, shira: Run) -> Table:
    """Before and after, for one task."""
    chance = 1 / len(task.labels)
    result = table(
        f"{task.name}: {task.question}",
        "",
        "accuracy",
        "trained parameters",
        "share of model",
        "file",
        "seconds",
        right=("accuracy", "trained parameters", "share of model", "file", "seconds"),
        note=f"{len(task.labels)} labels, chance {chance:.1%}, {len(task.train):,} training and "
        f"{len(task.test):,} test docstrings",
    )
    for name, run in (("before: frozen encoder, trained head", frozen), ("after: SHiRA", shira)):
        result.add_row(
            name,
            f"{run.accuracy:.1%} (+- {_standard_error(run.accuracy, len(task.test)):.1%})",
            f"{run.trained:,}",
            f"{run.trained / run.total:.2%}",
            "-" if run.file_bytes is None else megabytes(run.file_bytes),
            f"{run.seconds:.0f}",
        )
    return result


def proofs(found: Mapping[str, Any]) -> list[Proof]:
    """What the second process found, as statements that hold or do not."""
    result = []
    for task, seen in found["tasks"].items():
        result.append(
            Proof(
                seen["predictions_changed"] == 0 and seen["largest_logit_difference"] < 1e-4,
                f"{task}: {seen['predictions'] - seen['predictions_changed']} of "
                f"{seen['predictions']} predictions equal those of the training process "
                f"(largest difference of a logit: {seen['largest_logit_difference']:.1e})",
            )
        )
        result.append(
            Proof(
                seen["weights_changed_while_in"] > 0 and seen["merged_difference"] < 1e-4,
                f"{task}: merged, {seen['weights_changed_while_in']:,} base weights are "
                "overwritten and the logits are those of the unmerged model "
                f"(largest difference: {seen['merged_difference']:.1e})",
            )
        )
    changed = len(found["base_changed"]) + len(found["base_missing"])
    result.append(
        Proof(
            changed == 0,
            f"after {len(found['switch_seconds'])} switches, "
            f"{found['base_tensors'] - changed} of {found['base_tensors']} base tensors "
            f"({found['base_weights']:,} weights) are bit for bit those of a fresh load",
        )
    )
    return result


def switch_line(found: Mapping[str, Any]) -> str:
    """How long a switch took."""
    seconds = found["switch_seconds"]
    return (
        "a switch (unmerge, set_adapter, merge) takes "
        f"{median_milliseconds(seconds):.2f} ms in the median of {len(seconds)}"
    )


def _standard_error(share: float, count: int) -> float:
    """One standard error of a share that was estimated from `count` draws."""
    return math.sqrt(share * (1 - share) / max(count, 1))
