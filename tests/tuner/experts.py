# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts with random weights, as transformers lays them out."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_OF_QWEN = {"moe_intermediate_size": 24, "num_experts": 6, "decoder_sparse_step": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": {**_OF_QWEN, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": _OF_QWEN,
    "Qwen3Next": {
        **_OF_QWEN,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "DeepseekV3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 4,
    },
    "GptOss": {"num_local_experts": 6},
    "Llama4": {
        "num_local_experts": 6,
        "intermediate_size_mlp": 24,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
}
"""By the start of the class's name: what its configuration has beside the common sizes."""

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(name: str = "Qwen3Moe", seed: int = 0, implementation: str = "eager", **options: Any):
    """A model with two layers and six experts in each, in eval mode."""
    torch.manual_seed(seed)
    config_class = getattr(
        transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config"
    )
    config = config_class(**_SIZES | MODELS[name] | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    if name == "Llama4":  # whose experts begin as zeros
        for key, parameter in model.named_parameters():
            if "experts" in key:
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        model.set_experts_implementation(implementation)
    return model.eval()


def tokens(seed: int = 0, shape=(2, 12)):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))
