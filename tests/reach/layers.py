# SPDX-License-Identifier: Apache-2.0
"""Rows of layers and parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.reach.case import Case, row
from tests.tuner.models import MLP, gpt2, llama

KIND = "Layers and parameters"


class One(nn.Module):
    """A layer between two that are not adapted, so that its inputs vary and its output is 2-D."""

    def __init__(self, layer: nn.Module, last: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(last, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).flatten(1))


def one(layer, last: int, x: Tensor, **options) -> Case:
    """A case of one layer, made by a function; ``last`` is the size of its flat output."""
    targets = options.pop("targets", {"target_modules": ["layer"]})
    return Case(lambda: One(layer(), last), lambda model: model(x), targets, **options)


@row(KIND, "`nn.Linear`")
def linear() -> Case:
    x = torch.randn(16, 8)
    return Case(MLP, lambda model: model(x), {"target_modules": ["lin1", "lin2"]})


@row(KIND, "transformers' `Conv1D`")
def conv1d_of_transformers() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    targets = {"target_modules": ["c_attn"]}
    lora = {"fan_in_fan_out": True}
    return Case(gpt2, lambda model: model(ids).logits, targets, lora=lora)


@row(KIND, "`nn.Embedding`")
def embedding() -> Case:
    return one(lambda: nn.Embedding(10, 6), 24, torch.randint(0, 10, (16, 4)))


@row(KIND, "`nn.Conv2d`")
def conv2d() -> Case:
    return one(lambda: nn.Conv2d(2, 4, 3), 64, torch.randn(16, 2, 6, 6))


@row(KIND, "`nn.Conv2d` in groups")
def conv2d_in_groups() -> Case:
    return one(lambda: nn.Conv2d(4, 4, 3, groups=2), 64, torch.randn(16, 4, 6, 6))


@row(KIND, "`nn.Conv1d`")
def conv1d() -> Case:
    return one(lambda: nn.Conv1d(4, 6, 3), 24, torch.randn(16, 4, 6))


@row(KIND, "`nn.Conv3d`")
def conv3d() -> Case:
    return one(lambda: nn.Conv3d(2, 4, 2), 32, torch.randn(16, 2, 3, 3, 3))


@row(KIND, "`nn.ConvTranspose2d`")
def conv_transpose2d() -> Case:
    return one(lambda: nn.ConvTranspose2d(4, 4, 2), 64, torch.randn(16, 4, 3, 3))


class Attending(nn.Module):
    """`nn.MultiheadAttention` over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@row(KIND, "`nn.MultiheadAttention`")
def multihead_attention() -> Case:
    x = torch.randn(4, 5, 8)
    targets = {"target_modules": ["attention"]}
    return Case(Attending, lambda model: model(x), targets, exact=False)


@row(KIND, "whole modules beside it (`modules_to_save`)")
def modules_to_save() -> Case:
    x = torch.randn(16, 8)
    targets = {"target_modules": ["lin1"], "modules_to_save": ["lin2"]}
    return Case(MLP, lambda model: model(x), targets)


@row(KIND, "new tokens' rows (`trainable_token_indices`)")
def trainable_token_indices() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    targets = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    return Case(llama, lambda model: model(ids).logits, targets)


@row(KIND, "new tokens' rows, of a tied head too")
def tied_tokens() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    build = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    targets = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    return Case(build, lambda model: model(ids).logits, targets)


@row(KIND, "an embedding and its tied head (`ensure_weight_tying`)")
def tied_embedding() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    build = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    targets = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    return Case(build, lambda model: model(ids).logits, targets)


@row(KIND, "the embedding of a tied head, alone")
def embedding_alone() -> Case:
    ids = torch.randint(0, 64, (2, 8))
    build = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    return Case(build, lambda model: model(ids).logits, {"target_modules": ["embed_tokens"]})


@row(KIND, "experts in one 3-D parameter (`target_parameters`)")
def target_parameters() -> Case:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    ids = torch.randint(0, 64, (2, 8))
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    targets = {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    build = lambda: Qwen3MoeForCausalLM(config).eval()  # noqa: E731
    return Case(build, lambda model: model(ids).logits, targets, exact=False)
