# SPDX-License-Identifier: Apache-2.0
"""The models that the ``gpu`` suite compares, all on one and the same frozen base.

=============  ================================================================================
floor          the base, frozen; the backward pass goes to the inputs only
shira          this library, random mask, the backend that it chooses
shira-NAME     the same with ``SHIRA_BACKEND=NAME``, for each other backend that can run there
shira-block    this library, random blocks
peft-shira     PEFT's own SHiRA: same positions and values as ``shira``
peft-lora      PEFT's LoRA with the same number of trained parameters in each layer, in the
               dtype of the base (PEFT's default, float32, would cast every input)
=============  ================================================================================

The base of 3 billion parameters is there once: every contender has modules of its own around the
same tensors, which none of them may change; the suite compares their bits afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Shape:
    """A Llama; the defaults are those of Llama-3.2-3B."""

    layers: int = 28
    hidden: int = 3072
    intermediate: int = 8192
    heads: int = 24
    kv_heads: int = 8
    vocab: int = 128256


def base_model(shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A frozen Llama with random weights, made where it is to run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).train()


def batch(shape: Shape, rows: int, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """``inputs_embeds`` (rows, tokens, hidden) that require a gradient, and labels."""
    generator = torch.Generator().manual_seed(SEED + 1)
    inputs = torch.randn(rows, tokens, shape.hidden, generator=generator)
    labels = torch.randint(shape.vocab, (rows, tokens), generator=generator)
    return {
        "inputs_embeds": inputs.to(device, dtype).requires_grad_(),
        "labels": labels.to(device),
    }


def around(base: nn.Module) -> nn.Module:
    """New modules around the same parameters and buffers."""
    shared = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


class Supports:
    """The positions of one set of targets, by the memory of the weight they are on."""

    def __init__(self, base: nn.Module, targets: tuple[str, ...], r: int) -> None:
        from shira.masks import random_support

        self.by_weight = {
            module.weight.data_ptr(): random_support(
                module.weight.shape, r * sum(module.weight.shape), seed=SEED, name=name
            )
            for name, module in base.named_modules()
            if name.rpartition(".")[2] in targets
        }

    def support(self, layer: nn.Module, r: int, **_: Any) -> Any:
        return self.by_weight[layer.weight.data_ptr()]

    def mask(self, layer: nn.Module, r: int, **_: Any) -> Tensor:
        return self.support(layer, r).to(layer.weight.device).mask().to(layer.weight.dtype)


@dataclass
class Contender:
    """A model ready to train, and how to run one step of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    environment: Mapping[str, str]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The environment variables of this contender: backward threads see nothing else."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


Maker = Callable[[nn.Module], nn.Module]


def makers(
    base: nn.Module, targets: tuple[str, ...], r: int, backends: list[str]
) -> dict[str, tuple[Maker, dict[str, str]]]:
    """How each contender is made from modules of its own, and its environment."""
    supports = Supports(base, targets, r)
    names = list(targets)

    def shira(model: nn.Module) -> nn.Module:
        from shira import ShiraConfig, get_peft_model

        config = ShiraConfig(r=r, target_modules=names, random_seed=SEED)
        config.mask_fn = supports.support
        return get_peft_model(model, config)

    def blocks(model: nn.Module) -> nn.Module:
        from shira import ShiraConfig, get_peft_model

        return get_peft_model(
            model,
            ShiraConfig(
                r=r,
                target_modules=names,
                random_seed=SEED,
                mask_type="block",
                mask_options={"block_size": BLOCK_SIZE},
            ),
        )

    def peft_shira(model: nn.Module) -> nn.Module:
        # From the defining submodules: importing shira leaves these as they are.
        from peft.tuners.shira.config import ShiraConfig
        from peft.tuners.shira.model import ShiraModel

        config = ShiraConfig(r=r, target_modules=names, random_seed=SEED)
        config.mask_fn = supports.mask
        return ShiraModel(model, {"default": config}, "default")

    def peft_lora(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=r, lora_alpha=r, target_modules=names)
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    forced = {f"shira-{name}": (shira, {"SHIRA_BACKEND": name}) for name in backends}
    return {
        "floor": (lambda model: model, {}),
        "shira": (shira, {}),
        **forced,
        "shira-block": (blocks, {}),
        "peft-shira": (peft_shira, {}),
        "peft-lora": (peft_lora, {}),
    }


def build(name: str, maker: tuple[Maker, dict[str, str]], base: nn.Module) -> Contender:
    """The contender of that name around the base's own tensors."""
    make, environment = maker
    model = make(around(base)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0) if trained else None
    return Contender(name, model, optimizer, environment)


def fill(contender: Contender, seed: int = 2) -> None:
    """Give the adapter values other than zero: the same ones to all SHiRAs of equal positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in contender.trained:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def other_backends(device: str, dtype: torch.dtype, density: float) -> list[str]:
    """Backends that can compute an unstructured support there, other than the one chosen."""
    from shira.errors import ConfigError
    from shira.ops import choose, use_backend
    from shira.ops.gradient import BACKENDS

    able = []
    chosen = choose(device, dtype, density).name
    for name in BACKENDS:
        with contextlib.suppress(ConfigError), use_backend(name):
            choose(device, dtype, density)
            able.append(name)
    return [name for name in able if name != chosen]
