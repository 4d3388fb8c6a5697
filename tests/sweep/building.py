# SPDX-License-Identifier: Apache-2.0
"""Trying sizes and inputs until a model of a class runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.sweep.checking import NO_GRAD, Run, outputs

MOST_PARAMETERS = 20_000_000
MOST_INPUTS = 16
SAME_REASON = 5
STAGES = ("model", "inputs")


class NotBuilt(Exception):
    """No small model of the class could be made or fed; says why."""


def first_that_runs(
    profiles: Iterable[Any],
    make: Callable[[Any], nn.Module],
    inputs: Callable[[nn.Module], Iterable[dict[str, Any]]],
) -> tuple[nn.Module, Run]:
    """Build models with ever other sizes until one runs on one of its inputs.

    Raises:
        NotBuilt: If none does, with the reason of the first that came farthest.
    """
    farthest, why = -1, ""
    reasons: Counter[str] = Counter()
    for profile in profiles:
        stage = 0
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in make(profile).parameters())
            if count > MOST_PARAMETERS:
                raise NotBuilt(f"{count / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = make(profile).eval()
            stage = 1
            return model, _first_input(model, inputs)
        except Exception as error:
            reasons[_said(error)] += 1
            if stage > farthest:
                farthest, why = stage, _said(error)
            if stage and reasons[_said(error)] == SAME_REASON:
                break
    raise NotBuilt(f"{STAGES[farthest]}: {why}")


def _first_input(model: nn.Module, inputs: Callable[[nn.Module], Iterable[dict[str, Any]]]) -> Run:
    first: Exception = NotBuilt("there is no input to try")
    for place, given in enumerate(inputs(model)):
        if place == MOST_INPUTS:
            break

        def run(model: nn.Module, given: dict[str, Any] = given) -> Any:
            return model(**given)

        try:
            if outputs(model, run, NO_GRAD):
                return run
            raise NotBuilt("no floating output")
        except Exception as error:
            if place == 0:
                first = error
    raise first


def linear_layers(model: nn.Module) -> Sequence[str]:
    """Return the names of all linear layers."""
    return [name for name, module in model.named_modules()
            if name and isinstance(module, (nn.Linear, Conv1D))]  # fmt: skip


def _said(error: BaseException) -> str:
    kind = "" if isinstance(error, NotBuilt) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:200]
