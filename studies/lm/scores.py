# SPDX-License-Identifier: Apache-2.0
"""Masks that are not built in, as ``mask_fn`` of a configuration: what a study tries first.

``principal``: the largest entries of the low-rank part of the weight (LIFT, arXiv 2506.00772).
``gallop``: large gradient over small weight (GaLLoP, arXiv 2510.19778). ``global_ranks``: the
budget across layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shira import Support
from shira.masks import grad_support
from studies.lm.protocol import PRINCIPAL_RANK

MaskFn = Callable[..., Support]


def principal(base_layer: nn.Module, r: int, **_: Any) -> Support:
    """Choose the largest entries of the weight's part of rank `PRINCIPAL_RANK`, about."""
    weight = base_layer.weight.detach().float()
    rank = min(PRINCIPAL_RANK, *weight.shape)
    oversampled = min(rank + 8, *weight.shape)
    with torch.random.fork_rng(devices=[]):  # the sketch is drawn: the same for every run
        torch.manual_seed(0)
        test = torch.randn(weight.shape[1], oversampled).to(weight.device)
    basis = torch.linalg.qr(weight @ test).Q
    for _ in range(3):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    small = basis.T @ weight
    largest = torch.linalg.eigh(small @ small.T).eigenvectors[:, -rank:]
    low = (basis @ largest) @ (largest.T @ small)
    return grad_support(low, r * sum(weight.shape))


def by_gradient(scores: Mapping[str, Tensor], *, over_weight: bool) -> MaskFn:
    """Choose by gradients that were summed before; `over_weight` divides them by the weight."""

    def mask_fn(base_layer: nn.Module, r: int, *, name: str = "", **_: Any) -> Support:
        score = scores[name]
        if over_weight:
            weight = base_layer.weight.detach().float().abs()
            score = score / (weight + 1e-2 * weight.mean())
        return grad_support(score, r * sum(score.shape))

    return mask_fn


def gradients(
    model: nn.Module, targets: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The sum over batches of the magnitude of each target weight's gradient, by parameter name."""
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and name.split(".")[-2] in targets
    }
    scores = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        found = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            scores[name] += gradient.abs()
    for weight in weights.values():
        weight.requires_grad_(False)
    return scores


def global_ranks(scores: Mapping[str, Tensor], r: int) -> dict[str, int]:
    """The rank of each module under one threshold on scores divided by the mean of their layer.

    At least 1, in all as many entries as `r` gives everywhere, rounded down to whole ranks.
    """
    total = sum(r * sum(score.shape) for score in scores.values())
    normal = {name: score / score.mean() for name, score in scores.items()}
    low, high = 0.0, max(float(score.max()) for score in normal.values())
    for _ in range(40):
        threshold = (low + high) / 2
        above = sum(int((score >= threshold).sum()) for score in normal.values())
        low, high = (threshold, high) if above > total else (low, threshold)
    shares = {
        name: float((score >= high).sum()) / sum(score.shape) for name, score in normal.items()
    }
    ranks = {name: max(1, int(share)) for name, share in shares.items()}
    spent = sum(rank * sum(scores[name].shape) for name, rank in ranks.items())
    for name in sorted(shares, key=lambda name: int(shares[name]) - shares[name]):
        if spent + sum(scores[name].shape) <= total:  # the largest fractions are rounded up
            ranks[name] += 1
            spent += sum(scores[name].shape)
    while spent > total:  # of many that got their 1 the highest pays
        name = max(ranks, key=lambda name: ranks[name])
        ranks[name] -= 1
        spent -= sum(scores[name].shape)
    return {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
