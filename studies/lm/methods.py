# SPDX-License-Identifier: Apache-2.0
"""The base model with each method in it, all at the same number of trained parameters.

The adapted weights are the seven linear layers of each block. LoRA and SHiRA train ``r * (m + n)``
parameters of an m x n weight. DoRA has m more, so four of the layers get ``r - 1``: with this
model's sizes that is LoRA's count to the parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from studies.lm.protocol import BLOCK_SIZE, LOW_RANK, Run
from studies.lm.scores import by_gradient, global_ranks, gradients, principal

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_DORA_LOWER = r".*\.(q|k|o|down)_proj"
ADAPTER = "default"

Batches = Callable[[], Sequence[dict[str, Tensor]]]


@dataclass(frozen=True)
class Adapted:
    """A model with a method in it.

    `groups` are what is trained, with its ``factor`` of the rate; `renewed` says that positions are
    to be chosen anew; `optimizer` is that of the method, if it is not AdamW.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    renewed: bool = False
    optimizer: Optimizer | None = None

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return sum(p.numel() for group in self.groups for p in group["params"])


def adapt(base: nn.Module, run: Run, batches: Batches) -> Adapted:
    """Put the run's method into `base`, which is changed.

    Args:
        base: the base model, frozen.
        run: method, size and seed.
        batches: gives the batches that masks are chosen on, where they are by gradients.
    """
    mask, *extras = run.method.split("+")
    if run.method == "full":
        model = base
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(any(f".{target}." in name for target in TARGETS))
    elif mask in LOW_RANK:
        model = _low_rank(base, run)
    elif mask == "peft-shira":
        model = _peft_shira(base, run)
    else:
        model = _shira(base, run, mask, "global" in extras, batches)
    if "relative" in extras or "factored" in extras:
        from shira import FactoredAdamW

        optimizer = FactoredAdamW(model, lr=1.0, by_weight="relative" in extras)
        groups = [_group(group["params"], group["lr"]) for group in optimizer.param_groups]
        return Adapted(model, groups, optimizer=optimizer if "factored" in extras else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Adapted(model, [_group(trained, 1.0)], "renewed" in extras)


def _group(parameters: Any, factor: float) -> dict[str, Any]:
    return {"params": list(parameters), "factor": factor}


def _low_rank(base: nn.Module, run: Run) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    rank, dora = run.rank, run.method == "dora"
    assert rank is not None
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        use_rslora=run.method == "rslora",
        use_dora=dora,
        target_modules=TARGETS,
        rank_pattern={_DORA_LOWER: rank - 1} if dora else {},
        alpha_pattern={_DORA_LOWER: 2 * (rank - 1)} if dora else {},
    )
    return get_peft_model(base, config)


def _peft_shira(base: nn.Module, run: Run) -> nn.Module:
    # From the defining submodules: importing shira replaces the names in peft and peft.tuners, and
    # leaves these as they are.
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=run.rank, target_modules=TARGETS, random_seed=run.seed)
    model = ShiraModel(base, {ADAPTER: config}, ADAPTER)
    model._cast_adapter_dtype(ADAPTER)  # to float32, as get_peft_model does
    return model


def _shira(
    base: nn.Module, run: Run, mask: str, across_layers: bool, batches: Batches
) -> nn.Module:
    from shira import ShiraConfig, calibrate, get_peft_model

    assert run.rank is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mask_type=")  # its mask_fn comes below
        config = ShiraConfig(
            r=run.rank, mask_type=mask, random_seed=run.seed, target_modules=TARGETS,
            mask_options={"block_size": BLOCK_SIZE} if mask == "block" else {},
        )  # fmt: skip
    if mask == "principal":
        config.mask_fn = principal
    elif mask == "gallop" or across_layers:
        scores = gradients(base, TARGETS, batches())
        config.mask_fn = by_gradient(scores, over_weight=mask == "gallop")
        if across_layers:
            config.rank_pattern = global_ranks(scores, run.rank)
    elif mask == "grad":
        config = calibrate(base, config, batches(), progress=False)
    return get_peft_model(base, config)
