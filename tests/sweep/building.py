# SPDX-License-Identifier: Apache-2.0
"""Trying sizes and inputs until a model of a class runs."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.sweep.checking import NO_GRAD, Run, outputs

MOST_PARAMETERS = 20_000_000
MOST_INPUTS = 20
SAME_REASON = 5
MOST_REPAIRS = 6
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
    farthest: int = -1
    why: Exception = NotBuilt("there is no input to try")
    for place, given in enumerate(inputs(model)):
        if place == MOST_INPUTS:
            break
        for _ in range(MOST_REPAIRS):

            def run(model: nn.Module, given: dict[str, Any] = given) -> Any:
                return model(**given)

            try:
                if outputs(model, run, NO_GRAD):
                    return run
                raise NotBuilt("no floating output")
            except Exception as error:
                depth = len(list(traceback.walk_tb(error.__traceback__)))
                if depth > farthest:
                    farthest, why = depth, error
                given = _repaired(given, str(error))
            if given is None:
                break
    raise why


def _repaired(given: dict[str, Any], error: str) -> Any:
    """Return the inputs with another width in one of them, as an error of torch asks; or None."""
    product = re.search(r"cannot be multiplied \((\d+)x(\d+) and (\d+)x\d+\)", error)
    convolution = re.search(r"to have (\d+) channels, but got (\d+) channels", error)
    if product:
        rows, have, wanted = map(int, product.groups())
        fits = [n for n, one in given.items() if _is_float(one) and one.shape[-1] == have]
        fits.sort(key=lambda n: given[n].numel() != rows * have)
        place = -1
    elif convolution:
        wanted, have = map(int, convolution.groups())
        fits = [n for n, one in given.items() if _is_float(one) and have in one.shape[1:]]
        place = list(given[fits[0]].shape).index(have, 1) if fits else 0
    else:
        return None
    if not fits:
        return None
    shape = list(given[fits[0]].shape)
    shape[place] = wanted
    return given | {fits[0]: torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def linear_layers(model: nn.Module) -> Sequence[str]:
    """Return the names of all linear layers."""
    return [name for name, module in model.named_modules()
            if name and isinstance(module, (nn.Linear, Conv1D))]  # fmt: skip


def _said(error: BaseException) -> str:
    kind = "" if isinstance(error, NotBuilt) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:200]
