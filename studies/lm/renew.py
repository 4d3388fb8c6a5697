# SPDX-License-Identifier: Apache-2.0
"""Positions chosen anew during training, for one's own loop.

The entries of smallest delta go, and their weights are the base's again to the bit, for the base
was never changed; those of largest gradient come. `EntryAdamW` keeps what it knows of the entries
that stay, and counts the steps of each entry, so that a new one's first steps are no larger than
anyone's and grow over a warm-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shira import ShiraLayer, Support

_STATE = {"first": 0.0, "second": 0.0, "steps": 0.0, "warm": 0.0}
"""What is known of an entry, and what is known of a new one."""


class EntryAdamW(torch.optim.Optimizer):
    """AdamW without weight decay, in which every entry of a parameter has its own step count.

    Args:
        groups: of parameters.
        lr: the rate.
        warmup_steps: of entries that come later; those that are there at the start have none.
    """

    def __init__(self, groups: Any, lr: float = 1e-3, *, warmup_steps: int = 1) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})
        self.warmup_steps = warmup_steps

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
                    state.update({name: torch.zeros_like(parameter) for name in _STATE})
                    state["warm"].fill_(1.0)
                first, second, steps, warm = (state[name] for name in _STATE)
                first.lerp_(gradient, 1 - one)
                second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
                steps += 1
                warm.add_(1 / self.warmup_steps).clamp_(max=1)
                spread = (second / (1 - two**steps)).sqrt_().add_(group["eps"])
                update = (first / (1 - one**steps)).div_(spread).mul_(warm)
                parameter.sub_(update.mul_(group["lr"]))


@contextmanager
def candidates(model: nn.Module, adapter: str, share: float) -> Iterator[dict[str, Tensor]]:
    """Collect, in a backward pass within, the untrained entries of largest gradient.

    The dense gradient of a layer lives for an instant. Yields what fills up: flat positions by
    module name, as many as `share` of the entries that the layer trains.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: ShiraLayer) -> Any:
        def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach().flatten(0, -2)

            def backward(gradient: Tensor) -> None:
                score = (gradient.flatten(0, -2).T @ x).abs_().flatten()
                trained = layer.support(adapter).indices.to(score.device, torch.int64)
                score[trained] = -1
                found[name] = score.topk(int(share * len(trained)), sorted=False).indices

            output.register_hook(backward)

        return layer.register_forward_hook(forward)

    handles = [watch(name, layer) for name, layer in layers_of(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def renew(model: nn.Module, adapter: str, optimizer: EntryAdamW, grown: dict[str, Tensor]) -> None:
    """Put new entries in the place of as many of the smallest delta, in every layer.

    Args:
        model: with SHiRA layers, not merged.
        adapter: whose entries.
        optimizer: of its values.
        grown: what `candidates` collected.
    """
    for name, layer in layers_of(model):
        values, new = layer.shira_weight[adapter], grown[name]
        positions = layer.support(adapter).indices.to(values.device, torch.int64)
        stays = values.abs().topk(len(values) - len(new), sorted=False).indices
        positions, order = torch.cat([positions[stays], new]).sort()
        state = optimizer.state[values]
        for tensor, fill in ((values, 0.0), *((state[what], _STATE[what]) for what in _STATE)):
            both = torch.cat([tensor[stays], tensor.new_full((len(new),), fill)])
            tensor.copy_(both[order])
        support = Support(layer.weight_shape, positions)
        layer.shira_indices[adapter] = support.coordinates().to(values.device)


def layers_of(model: nn.Module) -> Iterable[tuple[str, ShiraLayer]]:
    """Every SHiRA layer, by module name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, ShiraLayer)]
