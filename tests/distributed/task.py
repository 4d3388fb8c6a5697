# SPDX-License-Identifier: Apache-2.0
"""The training that every setting repeats: a tiny model, one batch a step, plain SGD.

One process takes the whole batch; each of several takes its share, so that the mean of their
losses and gradients is that of the one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shira import Adapter, ShiraConfig, get_peft_model
from tests.tuner.experts import EXPERTS, mixture
from tests.tuner.models import EVERYTHING, everything, llama, randomize

STEPS, BATCH, RATE = 3, 4, 0.5
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Result(NamedTuple):
    losses: list[float]
    grads: list[dict[str, Tensor]]
    """Of each step, by the names of the unwrapped model."""
    values: dict[str, Tensor]
    base_intact: bool


def adapted_llama(
    seed: int = 0, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **options: Any
) -> nn.Module:
    # The density leaves odd numbers of entries, which two ranks cannot halve.
    config = ShiraConfig(density=0.13, target_modules=PROJECTIONS, random_seed=seed, **options)
    model = get_peft_model(llama().to(dtype) if base is None else base, config)
    randomize(model, scale=0.1)
    return model


def adapted_tied_llama() -> nn.Module:
    """With rows of tokens, and the embedding and its head adapted as one."""
    config = ShiraConfig(density=0.13, target_modules=["lm_head", "q_proj"], random_seed=0)
    config.ensure_weight_tying, config.trainable_token_indices = True, [1, 2, 3]
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    randomize(model, scale=0.1)
    return model


def llama_loss(model: nn.Module, share: slice, step: int) -> Tensor:
    ids = torch.randint(64, (BATCH, 9), generator=torch.Generator().manual_seed(step))[share]
    return model(input_ids=ids, labels=ids).loss


def adapted_everything(seed: int = 0) -> nn.Module:
    """A layer of each kind."""
    config = ShiraConfig(density=0.23, target_modules=EVERYTHING)
    config.random_seed = seed
    model = get_peft_model(everything(), config)
    randomize(model)
    return model


def everything_loss(model: nn.Module, share: slice, step: int) -> Tensor:
    ids = torch.randint(11, (BATCH, 6), generator=torch.Generator().manual_seed(step))[share]
    return model(ids).square().mean()


def adapted_mixture(implementation: str = "eager") -> nn.Module:
    """With the stacks of its experts adapted, two of them in one module."""
    config = ShiraConfig(density=0.13, target_modules=["q_proj"], target_parameters=EXPERTS)
    config.random_seed = 0
    model = get_peft_model(mixture(implementation=implementation), config)
    randomize(model, scale=0.1)
    return model


def mixture_loss(model: nn.Module, share: slice, step: int) -> Tensor:
    ids = torch.randint(1, 97, (BATCH, 9), generator=torch.Generator().manual_seed(step))[share]
    return model(input_ids=ids, labels=ids).loss


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as one; a copy."""
    full = getattr(tensor.detach(), "full_tensor", tensor.detach)()
    return full.clone()


def bare(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for inserted in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(inserted, "")
    return name


def values_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {bare(name): whole(value) for name, value in named if "shira_weight" in name}


def others_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {bare(name): whole(value) for name, value in named if "shira_weight" not in name}


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, slice, int], Tensor],
    share: slice = slice(None),
    backward: Callable[[Tensor, int], Any] = lambda loss, step: loss.backward(),
    mean: Callable[[Tensor], float] = lambda loss: loss.item(),
    pieces: int = 1,
    before_piece: Callable[[bool], Any] = lambda last: None,
) -> Result:
    """Some steps of SGD.

    Args:
        model: Wrapped or not.
        loss_of: Loss of a share of the batch of a step.
        share: Which samples are this process's.
        backward: Of a loss, at a step.
        mean: Over all processes.
        pieces: Accumulate the gradient over so many pieces of the share.
        before_piece: Told whether the piece is the last.
    """
    before = others_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses, grads = [], []
    indices = range(BATCH)[share]
    for step in range(STEPS):
        total = torch.zeros(())
        for piece in range(pieces):
            before_piece(piece == pieces - 1)
            part = indices[piece * len(indices) // pieces : (piece + 1) * len(indices) // pieces]
            loss = loss_of(model, slice(part.start, part.stop), step) / pieces
            backward(loss, step)
            total += loss.detach().float()
        losses.append(mean(total))
        grads.append(
            {bare(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
        optimizer.zero_grad()
    after = others_of(model)
    intact = all(torch.equal(before[name], after[name]) for name in before)
    return Result(losses, grads, values_of(model), intact)


def save(model: nn.Module, path: Path) -> bytes:
    """The bytes of the adapter file that a model's adapter makes."""
    Adapter.from_model(model).save(path, format="peft")
    return (path / "adapter_model.safetensors").read_bytes()
