# SPDX-License-Identifier: Apache-2.0
"""AdamW with a second moment by rows and columns, for values at positions of a matrix.

A single entry gets few and noisy gradients: divided by its own second moment alone, all of them
move alike, those without a signal too. Here the second moment is that of the entry's row and column
(Adafactor, arXiv 1804.04235, section 3), as the trained entries of both show it. What differs
between rows and columns is evened out, what differs between entries within them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from studies.lm.renew import layers_of

Positions = tuple[Tensor, Tensor]
"""The row and the column of each value of a parameter, int64."""


def positions_of(model: nn.Module, adapter: str) -> dict[Tensor, Positions]:
    """The positions of every parameter that holds an adapter's values."""
    found = {}
    for _, layer in layers_of(model):
        rows, columns = layer.support(adapter).coordinates().long()
        values = layer.shira_weight[adapter]
        found[values] = (rows.to(values.device), columns.to(values.device))
    return found


class FactoredAdamW(torch.optim.Optimizer):
    """AdamW without weight decay whose second moments are those of rows and columns.

    Args:
        groups: of parameters, or their groups.
        positions: of each parameter.
        lr: the rate.
        betas: of the first and second moment.
    """

    def __init__(
        self,
        groups: Any,
        positions: Mapping[Tensor, Positions],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8})
        self.positions = positions

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one step."""
        for group in self.param_groups:
            one, two = group["betas"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = parameter.new_zeros(())
                    state["first"] = torch.zeros_like(parameter)
                    state["mean"] = parameter.new_zeros(())
                square, product = gradient.square(), None
                state["step"] += 1
                correction = 1 - two ** state["step"]
                state["mean"].lerp_(square.mean(), 1 - two)
                for name, at in zip(("rows", "columns"), self.positions[parameter], strict=True):
                    if name not in state:
                        size = int(at.max()) + 1
                        ones = parameter.new_zeros(size).index_add_(0, at, torch.ones_like(square))
                        state[f"{name} counted"] = ones.clamp_(min=1)
                        state[name] = parameter.new_zeros(size)
                    sums = torch.zeros_like(state[name]).index_add_(0, at, square)
                    state[name].lerp_(sums.div_(state[f"{name} counted"]), 1 - two)
                    moment = state[name].div(correction)[at]
                    product = moment if product is None else product.mul_(moment)
                spread = product.div_(state["mean"].div(correction).clamp_(min=1e-30)).sqrt_()
                first = state["first"].lerp_(gradient, 1 - one)
                update = first.div(1 - one ** state["step"]).div_(spread.add_(group["eps"]))
                parameter.sub_(update.mul_(group["lr"]))
