# SPDX-License-Identifier: Apache-2.0
"""The base model with each method in it, all at the same number of trained parameters.

The adapted weights are the six linear layers of each block that is not frozen. LoRA and SHiRA
train ``r * (m + n)`` parameters of an m x n weight. DoRA has m more, so half of the weights, those
of `_DORA_LOWER`, get ``r - 1``: for three blocks of this encoder that is LoRA's count to the
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from studies.accuracy.protocol import SHIRA_MASKS, Run

TARGETS = (
    r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|"
    r"intermediate\.dense|output\.dense)"
)
_DORA_LOWER = (
    r"encoder\.layer\.(0\..*|1\.(intermediate\.dense|attention\.self\.query|attention\.self\.key))"
)
HEAD = "classifier."


def is_head(name: str) -> bool:
    """Whether a parameter is the classifier's."""
    return f".{HEAD}" in f".{name}"


def adapt(base: nn.Module, run: Run, batches: Callable[[], Sequence[Any]]) -> nn.Module:
    """Put the run's method into `base`; what is to be trained requires gradients, the rest not.

    Args:
        base: the blocks that are not frozen, and the head.
        run: method, size and seed.
        batches: gives the batches from which ``grad`` and ``snip`` choose.
    """
    import peft

    from shira import get_peft_model

    if run.method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    if run.method == "head":
        model = base
    elif run.method in ("lora", "dora"):
        model = peft.get_peft_model(base, low_rank_config(run))
    elif run.method == "peft-shira":
        model = _peft_shira(base, run)
    else:
        model = get_peft_model(base, shira_config(base, run, batches))
    for name, parameter in model.named_parameters():
        if is_head(name):
            parameter.requires_grad_(True)
    return model


def trained(model: nn.Module) -> dict[str, int]:
    """How many parameters are trained in the encoder, and in the head."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(size for name, size in sizes.items() if is_head(name))
    return {"encoder": sum(sizes.values()) - head, "head": head}


def low_rank_config(run: Run) -> Any:
    """The configuration of LoRA or DoRA."""
    from peft import LoraConfig

    rank = run.rank
    assert rank is not None
    lower = _DORA_LOWER if run.method == "dora" else None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        use_dora=run.method == "dora",
        target_modules=TARGETS,
        rank_pattern={lower: rank - 1} if lower else {},
        alpha_pattern={lower: 2 * (rank - 1)} if lower else {},
    )


def shira_config(base: nn.Module, run: Run, batches: Callable[[], Sequence[Any]]) -> Any:
    """Our configuration; ``grad`` and ``snip`` have chosen their positions in it."""
    from shira import ShiraConfig, calibrate

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
    return config


def _peft_shira(base: nn.Module, run: Run) -> nn.Module:
    # From the defining submodules: importing shira replaces the names in peft and peft.tuners, and
    # leaves these as they are.
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=run.rank, target_modules=TARGETS, random_seed=run.seed)
    return ShiraModel(base, {"default": config}, "default")
