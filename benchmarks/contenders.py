# SPDX-License-Identifier: Apache-2.0
"""The models that the training suite compares, all made from the same random base.

==============  ====================================================================================
floor           the base, frozen; the backward pass goes to the inputs only
shira           this library's SHiRA on all linear layers, at random positions
shira-...       the same with the masks ``struct``, ``magnitude``, ``block``, ``block_diagonal``;
                ``grad`` and ``snip`` choose single entries too, and cost what ``shira`` does
peft-shira      PEFT's own SHiRA: the positions and values of ``shira``
peft-lora       PEFT's LoRA with the same number of trained parameters in each layer
full            full fine-tuning of the same layers; only when asked for
==============  ====================================================================================

The budget is one rank ``r`` for all: a layer of shape (m, n) trains exactly ``r * (m + n)`` values
in each of the adapters, and ``r`` is the one that comes nearest to the wanted density of the whole
model. All are trained with the fused AdamW, which transformers' Trainer takes by default. Every
contender's inputs require a gradient, as they do under gradient checkpointing or with a trained
layer below, so that nobody skips the backward pass through the first layer.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Workload:
    """A random Llama and the batch it is trained on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    batch: int
    tokens: int
    density: float
    dtype: str = "float32"
    seed: int = 0

    @property
    def rank(self) -> int:
        """The r for which ``sum(r * (m + n)) / sum(m * n)`` comes nearest to the density."""
        return max(1, round(self.density * self.adapted_entries / self._per_rank))

    @property
    def adapted_entries(self) -> int:
        """Entries of all adapted weights."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def trained_entries(self) -> int:
        """Trained parameters of an adapter."""
        return self.rank * self._per_rank

    @property
    def _per_rank(self) -> int:
        return self.layers * (8 * self.hidden + 3 * (self.hidden + self.intermediate))


def base_model(work: Workload) -> nn.Module:
    """The frozen random Llama; equal for equal workloads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        vocab_size=work.vocab,
        max_position_embeddings=work.tokens,
        use_cache=False,
        attn_implementation="sdpa",
        dtype=work.dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        model = LlamaForCausalLM(config).to(getattr(torch, work.dtype))
    return model.requires_grad_(False).train()


def batch(work: Workload) -> dict[str, Tensor]:
    """``inputs_embeds`` (batch, tokens, hidden) that require a gradient, and labels."""
    generator = torch.Generator().manual_seed(work.seed + 1)
    shape = (work.batch, work.tokens)
    inputs = torch.randn(*shape, work.hidden, generator=generator).to(getattr(torch, work.dtype))
    labels = torch.randint(work.vocab, shape, generator=generator)
    return {"inputs_embeds": inputs.requires_grad_(), "labels": labels}


def content_mask(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
    """A random 0/1 mask with ``r * (m + n)`` ones that depends on the weight's values alone.

    Given to both SHiRAs as their ``mask_fn``, it puts them on the same positions, layer by layer.
    """
    weight = base_layer.weight
    k = r * sum(weight.shape)
    digest = hashlib.sha256(weight.detach().reshape(-1)[:64].float().numpy().tobytes()).digest()
    chosen = np.random.default_rng(list(digest)).choice(
        weight.numel(), k, replace=False, shuffle=False
    )
    mask = torch.zeros(weight.numel(), dtype=weight.dtype)
    mask[torch.from_numpy(chosen)] = 1
    return mask.view_as(weight)


def _floor(model: nn.Module, work: Workload) -> nn.Module:
    return model


def _shira(model: nn.Module, work: Workload) -> nn.Module:
    from shira import ShiraConfig, get_peft_model

    config = ShiraConfig(r=work.rank, target_modules=list(TARGETS), random_seed=work.seed)
    config.mask_fn = content_mask
    return get_peft_model(model, config)


def _with_mask(mask_type: str) -> Callable[[nn.Module, Workload], nn.Module]:
    def make(model: nn.Module, work: Workload) -> nn.Module:
        from shira import ShiraConfig, get_peft_model

        config = ShiraConfig(
            r=work.rank,
            target_modules=list(TARGETS),
            random_seed=work.seed,
            mask_type=mask_type,
        )
        return get_peft_model(model, config)

    return make


def _full(model: nn.Module, work: Workload) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in TARGETS)
    return model


def _peft_shira(model: nn.Module, work: Workload) -> nn.Module:
    # From the defining submodules: importing shira replaces the names in peft and peft.tuners, and
    # leaves these as they are.
    from peft.tuners.shira.config import ShiraConfig
    from peft.tuners.shira.model import ShiraModel

    config = ShiraConfig(r=work.rank, target_modules=list(TARGETS), random_seed=work.seed)
    config.mask_fn = content_mask
    return ShiraModel(model, {"default": config}, "default")


def _peft_lora(model: nn.Module, work: Workload) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=list(TARGETS))
    return get_peft_model(model, config)


BUILDERS: dict[str, Callable[[nn.Module, Workload], nn.Module]] = {
    "floor": _floor,
    "shira": _shira,
    "shira-struct": _with_mask("struct"),
    "shira-magnitude": _with_mask("magnitude"),
    "shira-block": _with_mask("block"),
    "shira-block-diagonal": _with_mask("block_diagonal"),
    "peft-shira": _peft_shira,
    "peft-lora": _peft_lora,
    "full": _full,
}
DEFAULT = tuple(name for name in BUILDERS if name != "full")
REFERENCE = "floor"


@dataclass
class Contender:
    """A model ready to train, and how to run one step of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).loss

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(batch, tokens, vocab), without a graph."""
        with torch.no_grad():
            return self.model(inputs_embeds=inputs["inputs_embeds"]).logits

    def update(self) -> None:
        """The optimizer's step, and gradients dropped; nothing for the floor."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def build(name: str, base: nn.Module, work: Workload) -> Contender:
    """Wrap ``base`` itself (not a copy) as the contender of that name."""
    model = BUILDERS[name](base, work).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True) if trained else None
    )
    return Contender(name, model, optimizer)


def build_all(work: Workload, names: Sequence[str] = DEFAULT) -> dict[str, Contender]:
    """Each contender on its own copy of the same base."""
    base = base_model(work)
    return {name: build(name, copy.deepcopy(base), work) for name in names}


def fill(contender: Contender, seed: int = 2) -> None:
    """Give the adapter values other than zero: the same ones to both SHiRAs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in contender.trained:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def base_weights(contender: Contender) -> list[Tensor]:
    """All frozen floating-point parameters, in the order of the model."""
    return [p for p in contender.model.parameters() if not p.requires_grad]
