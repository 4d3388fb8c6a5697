# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, of real architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Three linear layers; the last two adapt well."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        self.lin0 = nn.Linear(8, size)
        self.lin1 = nn.Linear(size, size, bias=False)
        self.lin2 = nn.Linear(size, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


class Everything(nn.Module):
    """A layer of each kind that SHiRA adapts."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.volume = nn.Conv3d(1, 4, (3, 3, 1), padding="same")
        self.conv1d = Conv1D(10, 96)
        self.along = nn.Conv1d(10, 8, 3, padding=1, padding_mode="circular", groups=2)
        self.back = nn.ConvTranspose1d(8, 10, 2, stride=2, padding=1, output_padding=1)
        self.lin = nn.Linear(10, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids).unsqueeze(1)  # (B, 1, T, 8)
        x = torch.tanh(self.conv(x)).unsqueeze(1)  # (B, 1, 3, T, 8)
        x = torch.tanh(self.volume(x)).permute(0, 3, 1, 2, 4).flatten(2)  # (B, T, 96)
        x = torch.tanh(self.conv1d(x)).mT  # (B, 10, T)
        x = torch.tanh(self.back(torch.tanh(self.along(x)))[..., ::2])
        return self.lin(x.mT)


EVERYTHING = ["emb", "conv", "volume", "conv1d", "along", "back", "lin"]
"""Its layers."""


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> MLP:
    torch.manual_seed(seed)
    return MLP().to(dtype)


def everything(seed: int = 0, dtype: torch.dtype = torch.float32) -> Everything:
    torch.manual_seed(seed)
    return Everything().to(dtype)


def llama(seed: int = 0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def opt(seed: int = 0):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(config).eval()


def t5(seed: int = 0):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


def gpt2(seed: int = 0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights that are not an adapter's, by the base model's own names."""
    from shira.store.names import base_module_name

    return {
        base_module_name(name): value.detach().clone()
        for name, value in model.state_dict().items()
        if ".shira_" not in name and ".modules_to_save." not in name
    }


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomize(model: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Give every adapter values that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".shira_weight." in name:
                draw = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(draw)
