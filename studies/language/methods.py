# SPDX-License-Identifier: Apache-2.0
"""The base model with each method in it, all at the same number of trained parameters.

The adapted weights are the seven linear layers of each block. LoRA and SHiRA train ``r * (m + n)``
parameters of an m x n weight. DoRA has m more, so the layers of the MLP get ``r - 1``: with this
model's sizes (256 x 256 and 512 x 256) that is LoRA's count to the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from studies.language.protocol import SHIRA_MASKS, Run

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_MLP = r".*\.(gate|up|down)_proj"


def adapt(base: nn.Module, run: Run, batches: Callable[[], Sequence[Any]]) -> nn.Module:
    """Put the run's method into `base`; what is to be trained requires gradients, the rest not.

    Args:
        base: the base model.
        run: method, rank and seed.
        batches: gives the batches from which ``grad`` and ``snip`` choose.
    """
    if run.method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    if run.method in ("lora", "dora"):
        return _low_rank(base, run)
    return _shira(base, run, batches)


def trained(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _low_rank(base: nn.Module, run: Run) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    dora = run.method == "dora"
    config = LoraConfig(
        r=run.rank,
        lora_alpha=2 * run.rank,
        use_dora=dora,
        target_modules=TARGETS,
        rank_pattern={_MLP: run.rank - 1} if dora else {},
        alpha_pattern={_MLP: 2 * (run.rank - 1)} if dora else {},
    )
    return get_peft_model(base, config)


def _shira(base: nn.Module, run: Run, batches: Callable[[], Sequence[Any]]) -> nn.Module:
    from shira import ShiraConfig, calibrate, get_peft_model

    mask_type, options = SHIRA_MASKS[run.method]
    config = ShiraConfig(
        r=run.rank,
        mask_type=mask_type,
        mask_options=options,
        random_seed=run.seed,
        target_modules=TARGETS,
    )
    if mask_type in ("grad", "snip"):
        config = calibrate(base, config, batches(), progress=False)
    return get_peft_model(base, config)
